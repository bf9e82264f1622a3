"""The parts of a decode step add up to it, and an operator that is not found is said."""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import step

REPOSITORY = Path(__file__).parents[2]


def event(key: str, microseconds: float) -> SimpleNamespace:
    return SimpleNamespace(key=key, cpu_time_total=microseconds)


def test_operators_are_shares_of_the_forward_pass() -> None:
    seen = [
        event("vllm_bmos::linear", 3e6),
        event("vllm_bmos::cpu_linear_x", 1e6),
        event("vllm::unified_attention_with_output", 2e6),
        event("aten::linear", 9e6),
    ]
    shares = step.operator_shares(seen, 10.0)
    assert shares == {"1-bit layers": 0.4, "attention and KV cache": 0.2}


def test_an_operator_that_was_not_seen_is_named() -> None:
    with pytest.raises(ValueError, match="1-bit layers: expected operators vllm_bmos::"):
        step.operator_shares([event("vllm::unified_attention", 1.0)], 1.0)


def test_a_stopwatch_adds_up_calls_and_begins_again() -> None:
    watch = step.Stopwatch()
    nap = watch.around("nap", lambda seconds: time.sleep(seconds))
    nap(0.01)
    nap(seconds=0.01)
    assert watch.take()["nap"] >= 0.02
    assert watch.take() == {}


@pytest.mark.slow
def test_the_parts_of_a_step_add_up_to_it(tmp_path: Path) -> None:
    file = tmp_path / "step.json"
    command = [sys.executable, "benchmarks/step.py", "--shape", "tiny", "--batch", "1", "3"]
    command += ["--steps", "6", "--json", str(file), "--work", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(file.read_text())["rows"]
    assert [row["batch"] for row in rows] == [1, 3]
    for row in rows:
        assert sum(row["parts_ms"].values()) == pytest.approx(row["step_ms"], abs=0.05)
        assert row["parts_ms"]["1-bit layers"] > 0 and row["parts_ms"]["lm_head"] > 0
    assert "| 1-bit layers |" in done.stdout
