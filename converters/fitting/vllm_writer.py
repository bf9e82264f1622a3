"""Writes text with vLLM, in a process of its own: `python -m converters.fitting.vllm_writer`.

vLLM batches many sequences of unequal length. Its process leaves no memory behind, and does not
take torchrun's settings for the converter as its own.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch

from converters.calibration import CalibrationError

LENGTH = 512  # tokens of one sequence
ABOUT = 0.95  # of the tokens that were asked for are enough: a last round of few sequences is slow
ROOT = Path(__file__).resolve().parents[2]
# What torchrun sets for the converter's processes; vLLM would join their group.
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

Sequences = list[list[int]]


def reason_against(path: Path) -> str | None:
    """Why vLLM cannot write with the model at `path`, as far as that can be seen at once."""
    if find_spec("vllm") is None:
        return "vLLM is not installed"
    if not path.is_dir():
        return f"vLLM loads directories, not {path.name}"
    return None


def enough(
    write: Callable[[list[int]], Sequences], vocabulary: int, tokens: int, seed: int
) -> Sequences:
    """Have sequences written, each from a random first token, until they have about `tokens`."""
    generator = torch.Generator().manual_seed(seed)
    rows: Sequences = []
    written, expected = 0, float(LENGTH)
    while written < ABOUT * tokens:  # sequences may end early
        count = math.ceil((tokens - written) / expected)
        rows += write(torch.randint(vocabulary, (count,), generator=generator).tolist())
        written = sum(map(len, rows))
        expected = written / len(rows)
    return rows


def write_with_vllm(path: Path, vocabulary: int, tokens: int, seed: int) -> Sequences:
    """Sample about `tokens` tokens from the model in a directory; see `enough`.

    Raises:
        CalibrationError: if vLLM fails; what it said is on stderr.
    """
    environment = {k: v for k, v in os.environ.items() if k not in TORCHRUN}
    environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")  # GiB; vLLM's own choice is 92 % of all
    environment.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    environment.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    task = {"path": str(path), "vocabulary": vocabulary, "tokens": tokens, "seed": seed}
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "job.json"
        job.write_text(json.dumps(task), encoding="utf-8")
        command = [sys.executable, "-m", "converters.fitting.vllm_writer", str(job)]
        code = subprocess.run(command, env=environment, stdout=sys.stderr).returncode
        if code:
            raise CalibrationError(
                f"vLLM could not write with {path} (exit code {code}; see above). Give "
                f"self:{tokens}:transformers to write with transformers."
            )
        rows: Sequences = json.loads(job.read_text(encoding="utf-8"))
        return rows


def main() -> None:
    """Do the job in the file that is named, and put the sequences in its place."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", type=Path, help="path, vocabulary, tokens and seed as JSON")
    job = parser.parse_args().job
    task = json.loads(job.read_text(encoding="utf-8"))
    from vllm import LLM, SamplingParams
    from vllm.config import ModelConfig

    length = min(LENGTH, ModelConfig(task["path"]).max_model_len)
    llm = LLM(task["path"], max_model_len=length, seed=task["seed"])
    options = SamplingParams(temperature=1.0, max_tokens=length - 1)

    def write(starts: list[int]) -> Sequences:
        outputs = llm.generate([{"prompt_token_ids": [start]} for start in starts], options)
        return [[*(o.prompt_token_ids or []), *o.outputs[0].token_ids] for o in outputs]

    rows = enough(write, task["vocabulary"], task["tokens"], task["seed"])
    job.write_text(json.dumps(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
