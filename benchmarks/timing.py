"""Timing: one call at a time on a CPU, CUDA events around graph replays on a GPU.

A ring is a list of calls that do the same work on different copies of the weights. Going round a
ring that is larger than the caches reads the weights from memory, as a real model does ("cold");
a ring of one copy keeps them in the caches ("hot").
"""

import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)
SETTLE_SECONDS = 0.002  # lets the spinning threads of another provider's OpenMP pool go to sleep


@dataclass(frozen=True)
class Ring:
    """Calls that do the same work on different copies of the weights.

    Attributes:
        calls: each does the work once on its copy.
        products: products that one call does (a ggml graph holds several); times are per product.
        output: y[M, N] from what a call returned; the returned value itself if not given.
        within: runs a function in the surroundings that the calls need: a thread, an environment.
    """

    calls: list[Callable[[], Any]]
    products: int = 1
    output: Callable[[Any], torch.Tensor] = lambda returned: returned
    within: Callable[[Callable[[], Any]], Any] = lambda function: function()

    def result(self, index: int) -> torch.Tensor:
        """y[M, N] of one call."""
        return self.output(self.within(self.calls[index]))


@dataclass(frozen=True)
class Summary:
    """Times of one product in microseconds."""

    median_us: float
    p10_us: float
    p90_us: float
    samples: int


def summarize(samples: list[float]) -> Summary:
    """Median, p10 and p90 of at least one sample."""
    ordered = sorted(samples)

    def quantile(q: float) -> float:
        return ordered[round(q * (len(ordered) - 1))]

    return Summary(
        median_us=round(statistics.median(ordered), 2),
        p10_us=round(quantile(0.1), 2),
        p90_us=round(quantile(0.9), 2),
        samples=len(ordered),
    )


def warm_up(ring: Ring, seconds: float) -> Ring:
    """Make each call once, as libraries prepare themselves in the first call on a weight.

    Returns:
        The ring of those calls that were made before the time was over, at least one.
    """

    def run() -> int:
        end = time.perf_counter() + seconds
        for done, call in enumerate(ring.calls, start=1):
            call()
            if time.perf_counter() > end:
                return done
        return len(ring.calls)

    return replace(ring, calls=ring.calls[: ring.within(run)])


class Timer(Protocol):
    """Turns a ring into a function that times one round of it."""

    def sampler(self, ring: Ring) -> Callable[[], list[float]]:
        """A function that runs some calls of the ring and returns microseconds per product."""


class CpuTimer:
    """Wall-clock time of each call, Python dispatch included, going on round the ring.

    Args:
        round_seconds: about how long one round may last, if it has more than one call.
        max_calls: timed calls in a round at most.
    """

    def __init__(self, round_seconds: float = 0.02, max_calls: int = 20) -> None:
        self.round_seconds = round_seconds
        self.max_calls = max_calls

    def sampler(self, ring: Ring) -> Callable[[], list[float]]:
        """See `Timer`."""
        position = 0

        def run_next() -> float:
            nonlocal position
            call = ring.calls[position % len(ring.calls)]
            position += 1
            begin = time.perf_counter_ns()
            call()
            return (time.perf_counter_ns() - begin) / 1e3 / ring.products

        def sample() -> list[float]:
            time.sleep(SETTLE_SECONDS)
            # The first call wakes the thread pool and tells how many calls fit into the round. It
            # counts only if it is so long that the wake-up does not.
            first = run_next()
            calls = min(self.max_calls, int(self.round_seconds * 1e6 / first / ring.products))
            return [run_next() for _ in range(calls)] if calls else [first]

        return lambda: ring.within(sample)


class CudaTimer:
    """CUDA events around replays of a graph that holds the whole ring: no gaps from the host.

    Args:
        replays: timed replays in a round.
        min_calls: calls in a graph at least, so that the start of a graph is nothing beside them; a
            smaller ring is gone round several times.
    """

    def __init__(self, replays: int = 5, min_calls: int = 64) -> None:
        self.replays = replays
        self.min_calls = min_calls

    def sampler(self, ring: Ring) -> Callable[[], list[float]]:
        """See `Timer`."""
        # A warm-up on a side stream compiles and allocates: a capture may do neither.
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for call in ring.calls:
                call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        calls = ring.calls * -(-self.min_calls // len(ring.calls))
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        products = len(calls) * ring.products

        def sample() -> list[float]:
            graph.replay()
            samples = []
            for _ in range(self.replays):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                graph.replay()
                end.record()
                end.synchronize()
                samples.append(begin.elapsed_time(end) * 1e3 / products)
            return samples

        return sample


def plain_call_us(ring: Ring, calls: int = 64, repeats: int = 5) -> float:
    """Microseconds of a plain call on a GPU, one after the other and no graph: median of means.

    Where it is more than the graph's time, it is what Python and the driver take to launch.
    """
    again = ring.calls * -(-calls // len(ring.calls))
    means = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for call in again:
            call()
        torch.cuda.synchronize()
        means.append((time.perf_counter() - begin) * 1e6 / len(again) / ring.products)
    return round(statistics.median(means), 2)


def kernels_us(ring: Ring) -> dict[str, float]:
    """Mean microseconds of each GPU kernel in one call of the ring, by its name, gaps left out."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for call in ring.calls:
            call()
        torch.cuda.synchronize()
    return {
        event.key: round(event.self_device_time_total / len(ring.calls) / ring.products, 3)
        for event in profiler.key_averages()
        if event.self_device_time_total
    }


def time_interleaved(
    rings: Mapping[Key, Ring],
    timer: Timer,
    rounds: int,
    patience: float = float("inf"),
    failed: Callable[[Key, Exception], None] | None = None,
) -> dict[Key, Summary]:
    """Time every ring, a round of each in turn, so that noise of the machine meets all alike.

    The order is another one in each round: what ran just before leaves its mark (the clock after
    wide arithmetic, the caches), and should not always leave it on the same ring. A ring whose
    rounds have taken `patience` seconds gets no more of them. One that raises is left out, if
    `failed` takes its error.
    """
    samplers: dict[Key, Callable[[], list[float]]] = {}
    samples: dict[Key, list[float]] = {key: [] for key in rings}
    order, shuffler, spent = list(rings), random.Random(0), dict.fromkeys(rings, 0.0)

    def sample(key: Key) -> None:
        begin = time.perf_counter()
        samples[key] += samplers[key]()
        spent[key] += time.perf_counter() - begin

    def prepare(key: Key) -> None:
        samplers[key] = timer.sampler(rings[key])

    def each(action: Callable[[Key], None]) -> None:
        for key in list(order):
            try:
                action(key)
            except Exception as error:
                if failed is None:
                    raise
                failed(key, error)
                order.remove(key)

    each(prepare)
    for _ in range(rounds):
        shuffler.shuffle(order)
        each(lambda key: sample(key) if spent[key] < patience else None)
    return {key: summarize(samples[key]) for key in rings if key in order}
