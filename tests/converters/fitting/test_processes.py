"""Training on several processes, started by torchrun as a user would."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from converters.hf_to_bmos import main
from tests.converters.models import make_dense
from tests.tiny import add_tokenizer
from vllm_bmos.checkpoint.format import OUT_SCALE, WEIGHT
from vllm_bmos.checkpoint.reader import Checkpoint

pytestmark = pytest.mark.slow

CONVERTER = Path(main.__code__.co_filename)
FSDP_ON_CPU = Path(__file__).with_name("fsdp_on_cpu.py")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
STEP_TOKENS = 4 * 64


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, and beside it a text and a checkpoint to start from."""
    folder = tmp_path_factory.mktemp("processes")
    dense = make_dense(folder / "dense")
    add_tokenizer(dense)
    lines = [{"text": f"line {i}: the quick brown fox jumps over it"} for i in range(400)]
    (folder / "text.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert main([str(dense), str(folder / "start"), "--experts", "1"]) == 0
    return dense


def command(source: Path, target: Path, processes: int, steps: int, *flags: str) -> list[str]:
    """Stage qat on 4 windows a step."""
    script = FSDP_ON_CPU if "--fsdp" in flags else CONVERTER
    line = [sys.executable, *TORCHRUN, str(processes), str(script), str(source), str(target)]
    line += ["--stage", "qat", "--start-from", str(source.parent / "start"), "--experts", "1"]
    line += ["--calibration", str(source.parent / "text.jsonl"), "--length", "64"]
    line += ["--tokens", str(steps * STEP_TOKENS), "--batch", str(4 // processes)]
    return [*line, "--latent-lr", "0.2", "--jobs", "1", *flags]


def train(
    source: Path, name: str, processes: int, *flags: str, steps: int = 10
) -> tuple[Checkpoint, float, float, float]:
    """Run it.

    Returns:
        The result, the held-out KL before and after, and the share of what is trained that was
        kept by the first process.
    """
    target = source.parent / name
    there = {path.name for path in source.parent.iterdir()}
    line = command(source, target, processes, steps, *flags)
    done = subprocess.run(line, capture_output=True, text=True, env={**os.environ, "CI": "1"})
    assert done.returncode == 0, done.stderr
    found = re.findall(r"held-out KL: ([\d.]+) -> ([\d.]+)", done.stderr)
    assert len(found) == 1, "only the first process reports"
    ((here, of),) = re.findall(r"trained here: (\d+) of (\d+) values", done.stderr)
    # Nothing is left but the result: no fit folder, also not that of a killed run.
    left = {path.name for path in source.parent.iterdir()}
    assert left == there - {f"{name}.fit"} | {name}
    return Checkpoint(target), *map(float, found[0]), int(here) / int(of)


def assert_alike(one: Checkpoint, two: Checkpoint) -> None:
    """Nearly equal scales and signs."""
    for module in one.config.modules:
        scales = [c.tensor(f"{module}.{OUT_SCALE}").float() for c in (one, two)]
        torch.testing.assert_close(*scales, rtol=0.02, atol=1e-4)
        bits = one.tensor(f"{module}.{WEIGHT}") ^ two.tensor(f"{module}.{WEIGHT}")
        assert float((bits != 0).float().mean()) < 0.05


def test_two_processes_train_as_one_with_the_same_global_batch(source: Path) -> None:
    one, before, after, _ = train(source, "one", 1)
    assert after < before
    for name, flags, kept in (("two", (), 1), ("sharded", ("--fsdp",), 0.5)):
        two, before_two, after_two, share = train(source, name, 2, *flags)
        assert share == pytest.approx(kept, rel=0.02)
        assert before == before_two and after_two == pytest.approx(after, rel=0.01)
        assert_alike(one, two)


def test_a_killed_training_with_fsdp_continues(source: Path) -> None:
    steps, flags = 45, ("--fsdp", "--latent-lr", "0.05")
    whole, before, after, _ = train(source, "whole", 2, *flags, steps=steps)
    assert after < before
    target = source.parent / "killed"
    state = target.with_name("killed.fit") / "qat" / "checkpoint-25" / "trainer_state.json"
    line = command(source, target, 2, steps, *flags)
    process = psutil.Popen(line)
    try:
        while not state.exists():
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        for one in (*process.children(recursive=True), process):
            one.kill()
        process.wait()
    assert not target.exists()
    continued, *_ = train(source, "killed", 2, *flags, "--resume", steps=steps)
    assert_alike(whole, continued)


def test_fsdp_on_a_cpu_is_refused_before_any_work(source: Path) -> None:
    line = command(source, source.parent / "refused", 2, 1, "--fsdp")
    line[line.index(str(FSDP_ON_CPU))] = str(CONVERTER)
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode != 0 and "--fsdp: accelerate has FSDP for GPUs only" in done.stderr
    assert not (source.parent / "refused.fit").exists()
