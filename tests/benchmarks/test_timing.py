import threading
import time

import pytest
import torch
from timing import CpuTimer, Ring, summarize, time_interleaved, warm_up


def test_summary_of_known_samples():
    summary = summarize([float(value) for value in range(100, -1, -1)])
    assert (summary.median_us, summary.p10_us, summary.p90_us) == (50, 10, 90)
    assert summary.samples == 101


def test_summary_of_one_sample():
    summary = summarize([7.0])
    assert summary.median_us == summary.p10_us == summary.p90_us == 7


def test_every_copy_is_visited_in_turn():
    visits: list[int] = []
    ring = Ring([lambda copy=copy: visits.append(copy) for copy in range(3)])
    sample = CpuTimer(round_seconds=1, max_calls=4).sampler(ring)
    assert len(sample()) == 4  # and one call before them
    sample()
    assert visits == [0, 1, 2] * 3 + [0]


def test_times_are_per_product():
    nap = 0.02
    ring = Ring([lambda: time.sleep(nap)], products=4)
    (sample,) = CpuTimer(round_seconds=0.001).sampler(ring)()
    assert nap * 1e6 / 4 <= sample < nap * 1e6


def test_interleaving_takes_turns():
    order: list[str] = []
    rings = {name: Ring([lambda name=name: order.append(name)]) for name in "ab"}
    summaries = time_interleaved(rings, CpuTimer(round_seconds=1, max_calls=2), rounds=3)
    rounds = ["".join(order[i : i + 6]) for i in range(0, 18, 6)]
    assert set(rounds) == {"aaabbb", "bbbaaa"}  # each goes first at times
    assert all(summary.samples == 6 for summary in summaries.values())


def test_calls_run_within_their_surroundings():
    names: list[str] = []

    def in_thread(function):
        results = []
        thread = threading.Thread(target=lambda: results.append(function()), name="own")
        thread.start()
        thread.join()
        return results[0]

    def call() -> torch.Tensor:
        names.append(threading.current_thread().name)
        return torch.ones(1)

    ring = Ring([call], within=in_thread)
    CpuTimer(max_calls=1).sampler(ring)()
    assert ring.result(0) == 1
    warm_up(ring, seconds=1)
    assert set(names) == {"own"}


@pytest.mark.parametrize(("seconds", "calls"), [(0, 1), (10, 3)])
def test_only_warm_copies_stay(seconds: float, calls: int):
    ring = Ring([lambda: time.sleep(0.001)] * 3)
    assert len(warm_up(ring, seconds).calls) == calls
