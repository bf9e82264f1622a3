"""Training on several processes, started by torchrun as a user would."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from converters.hf_to_bmos import main
from tests.converters.models import make_dense
from tests.tiny import add_tokenizer
from vllm_bmos.checkpoint.format import OUT_SCALE, WEIGHT
from vllm_bmos.checkpoint.reader import Checkpoint

CONVERTER = Path(main.__code__.co_filename)
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


def train(source: Path, name: str, processes: int, *flags: str) -> tuple[Checkpoint, float, float]:
    """Run stage qat on 4 windows a step; return the result and the held-out KL before and after."""
    target = source.parent / name
    batch = str(4 // processes)
    command = [sys.executable, *TORCHRUN, str(processes), str(CONVERTER), str(source), str(target)]
    command += ["--stage", "qat", "--start-from", str(source.parent / "start"), "--experts", "1"]
    command += ["--calibration", str(source.parent / "text.jsonl"), "--length", "64"]
    command += ["--tokens", "2560", "--batch", batch, "--latent-lr", "0.2", "--jobs", "1", *flags]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CI": "1"})
    assert done.returncode == 0, done.stderr
    found = re.findall(r"held-out KL: ([\d.]+) -> ([\d.]+)", done.stderr)
    assert len(found) == 1, "only the first process reports"
    return Checkpoint(target), *map(float, found[0])


@pytest.mark.slow
def test_two_processes_train_as_one_with_the_same_global_batch(tmp_path):
    source = make_dense(tmp_path / "dense")
    add_tokenizer(source)
    lines = [{"text": f"line {i}: the quick brown fox jumps over it"} for i in range(400)]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert main([str(source), str(tmp_path / "start"), "--experts", "1"]) == 0
    one, before, after = train(source, "one", 1)
    two, before_two, after_two = train(source, "two", 2)
    assert before == before_two and after < before
    assert after_two == pytest.approx(after, rel=0.01)
    for module in one.config.modules:
        scales = [c.tensor(f"{module}.{OUT_SCALE}").float() for c in (one, two)]
        torch.testing.assert_close(*scales, rtol=0.02, atol=1e-4)
        bits = one.tensor(f"{module}.{WEIGHT}") ^ two.tensor(f"{module}.{WEIGHT}")
        assert float((bits != 0).float().mean()) < 0.05
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"dense", "text.jsonl", "start", "one", "two"}  # no fit folder is left
