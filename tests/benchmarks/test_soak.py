"""The load generator: its bookkeeping, and five minutes of it."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from soak import Watch, failures, percentiles
from traffic import make_jobs

REPOSITORY = Path(__file__).parents[2]
GOOD = {
    "saturated": {"wrong": 0},
    "overloaded": {"wrong": 0},
    "idle_again_wrong": 0,
    "memory": {"drift": 0.001},
    "idle_before": {"open_files": 100, "processes": 4},
    "idle_after": {"open_files": 105, "processes": 4},
    "shutdown": {"code": 0, "processes_left": False, "requests": ["RemoteProtocolError"] * 8},
}


def test_a_good_run_has_no_failures() -> None:
    assert failures(GOOD) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"overloaded": {"wrong": 2}}, "overloaded: 2 wrong or failed answers"),
        ({"idle_again_wrong": 1}, "1 wrong answers after the load"),
        ({"memory": {"drift": 0.05}}, "grew by 5.0%"),
        ({"idle_after": {"open_files": 106, "processes": 4}}, "100 before the load, 106 after"),
        ({"shutdown": {**GOOD["shutdown"], "code": None}}, "it ran on"),
        ({"shutdown": {**GOOD["shutdown"], "processes_left": True}}, "left behind"),
        ({"shutdown": {**GOOD["shutdown"], "requests": []}}, "neither answered nor ended"),
    ],
)
def test_each_kind_of_failure_is_named(change: dict, said: str) -> None:
    (failure,) = failures(GOOD | change)
    assert said in failure


def test_drift_compares_the_ends_of_the_run_after_the_warm_up() -> None:
    sizes = [1, 1, 100, 100, 105, 103, 102, 102]
    watch = Watch(0, samples=[{"server": 1000, "engine": size - 1000} for size in sizes])
    summary = watch.summary()
    assert summary["drift"] == 0.02
    engine = {"first_quarter_bytes": 100 - 1000, "last_quarter_bytes": 102 - 1000}
    assert summary["by_process"]["engine"] == engine


def test_percentiles_are_in_milliseconds() -> None:
    assert percentiles([i / 1000 for i in range(100)]) == {"p50": 50.0, "p90": 90.0, "p99": 99.0}


def test_jobs_are_of_every_kind_and_always_the_same() -> None:
    jobs = make_jobs(16)
    assert jobs == make_jobs(16)
    kinds = Counter(job.kind for job in jobs)
    assert set(kinds) == {
        *("short", "long", "stream", "abort", "adapter"),
        *("sampled", "structured", "chat", "malformed"),
    }


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.feature(
    "Server",
    "five minutes of mixed load at and beyond saturation: streams, aborts, malformed requests, "
    "LoRA switches, structured output, prefix reuse, then SIGTERM",
    against="each answer with the idle server's; memory, files and processes before and after",
)
def test_five_minutes_of_load(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/soak.py", "--minutes", "5"]
    command += ["--json", str(tmp_path / "soak.json")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    result = json.loads((tmp_path / "soak.json").read_text())
    assert done.returncode == 0, result["failures"]
    assert sum(result["overloaded"]["requests"].values()) > 100
