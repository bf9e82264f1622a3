"""The parts of a decode step add up to it, and an operator that is not found is said."""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import step

REPOSITORY = Path(__file__).parents[2]


def event(key: str, microseconds: float) -> SimpleNamespace:
    return SimpleNamespace(key=key, cpu_time_total=microseconds)


def test_operators_are_shares_of_the_forward_pass() -> None:
    seen = [
        event("vllm_bmos::linear", 3e6),
        event("vllm_bmos::router_logits", 1e6),
        event("vllm::unified_attention_with_output", 1.5e6),
        event("vllm::unified_kv_cache_update", 0.5e6),
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


class Engine:
    """Gives each of the requests a token a step; every step takes one more millisecond a part."""

    def __init__(self, watch: step.Stopwatch, lost: int = 0) -> None:
        self.watch, self.lost, self.left, self.requests = watch, lost, 0, 0

    def add_request(self, name: str, prompt: object, params: Any) -> None:
        self.left, self.requests = params.max_tokens, self.requests + 1

    def has_unfinished_requests(self) -> bool:
        return self.left > 0

    def step(self) -> list[int]:
        for part, seconds in (("forward", 0.006), ("lm_head", 0.002), ("sampler", 0.001)):
            with self.watch.of(part):
                time.sleep(seconds)
        time.sleep(0.001)
        self.left -= 1
        return [0] * (self.requests - self.lost) if self.left >= 0 else []


ARGS = SimpleNamespace(steps=3, prompt=4)


def test_parts_are_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = {"1-bit layers": 0.5, "attention and KV cache": 0.25}
    monkeypatch.setattr(step, "operator_shares", lambda *_: shares)
    watch = step.Stopwatch()
    engine = Engine(watch)
    row = step.measure_batch(engine, watch, 2, ARGS)
    assert not engine.has_unfinished_requests() and watch.take() == {}
    assert row["step_ms"] >= 10 and row["tokens_per_s"] == pytest.approx(2e3 / row["step_ms"], 0.01)
    parts = row["parts_ms"]
    assert parts["1-bit layers"] == pytest.approx(2 * parts["attention and KV cache"], abs=0.02)
    least = [3, 1.5, 1.5, 2, 1, 1]  # ms; sleeps may be longer
    assert all(part >= 0.9 * ms for part, ms in zip(parts.values(), least, strict=True))


def test_a_step_without_one_of_the_requests_is_refused() -> None:
    watch = step.Stopwatch()
    with pytest.raises(RuntimeError, match="expected tokens for 3 requests in a step, found 2"):
        step.measure_batch(Engine(watch, lost=1), watch, 3, ARGS)


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
        assert all(ms >= 0 for ms in row["parts_ms"].values())
        assert row["parts_ms"]["1-bit layers"] > 0 and row["parts_ms"]["lm_head"] > 0
    assert "| 1-bit layers |" in done.stdout
