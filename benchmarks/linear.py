"""How fast is one linear layer? Our kernels against every way that users have today.

    python benchmarks/linear.py --shapes llama-7b llama-13b --M 1 4 16 64 256 512 --json FILE

Every provider's result is checked against float64 before it is timed. "cold" weights are read from
memory (the calls go round more copies than the caches hold), "hot" ones stay in the caches. The
repetitions of all providers are interleaved, so compare rows of one file only. A plot is written
beside the JSON. On a GPU the times are of CUDA graphs, in which vLLM runs a layer, and "call_us" is
what a plain call takes.
"""

import argparse
import contextlib
import ctypes
import gc
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from harness import (
    DTYPES,
    cache_sizes,
    common_parser,
    logger,
    machine_facts,
    positive_int,
    print_facts,
    start,
    write_json,
)
from limits import measure_limits
from peers import NAMES, Loaded, Mode, Peer, Weights, all_peers
from peers.bmos import call_overhead_us
from plots import plot_linear
from timing import CpuTimer, CudaTimer, Ring, Timer, plain_call_us, time_interleaved, warm_up

# (K, N) of the linear layers that the paper times (arXiv 2406.12311, table 5).
SHAPES = {
    "llama-7b": [(4096, 4096), (4096, 11008), (11008, 4096)],
    "llama-13b": [(5120, 5120), (5120, 13824), (13824, 5120)],
    "tiny": [(256, 192)],
}
QUICK_SHAPES = ["4096x4096", "4096x11008"]
QUICK_M = [1, 512]
MIN_COLD_BYTES = 256 * 10**6  # an H200 has an L2 cache of 60 MB
MAX_COPIES = 512
# For each case; copies that are not reached are not timed either.
WARM_UP_SECONDS, QUICK_WARM_UP_SECONDS = 0.5, 0.2
# Without a path for this processor a peer may need many seconds for one call.
PATIENCE_SECONDS, QUICK_PATIENCE_SECONDS = 10.0, 1.0
HOT_M = 16  # above it the weights' place no longer matters


@dataclass(frozen=True)
class Case:
    """One line of the tables: a provider in one mode with E experts (0: a plain product)."""

    provider: str
    mode: Mode
    E: int

    def __str__(self) -> str:
        return f"{self.provider}:{self.mode.name}" + (f":E={self.E}" if self.E else "")


def main() -> int:
    """Run the command line; return 1 if one of our results is wrong (a peer's is reported)."""
    args = parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    start(args.threads)
    machine = machine_facts(args.threads)
    print_facts(machine)
    machine["limits"] = limits = measure_limits(device)
    logger.info("%-16s %s", "limits", limits)
    peers, missing = usable_peers(args.providers, args.E, device)
    timer: Timer = CudaTimer() if device == "cuda" else CpuTimer()
    rows: list[dict[str, Any]] = []
    wrong: list[str] = []
    overhead = call_overhead_us(args.E) if "vllm_bmos" in args.providers else None
    result: dict[str, Any] = {"machine": machine, "missing": missing, "wrong": wrong}
    result |= {"mixing": [], "call_overhead_us": overhead, "rows": rows}
    for K, N in args.shapes:
        weights = Weights.random(K, N, DTYPES[args.dtype], device)
        for row in bench_shape(weights, peers, args, timer, wrong):
            rows.append(row | rates(row, limits))
        print_table(rows, K, N)
        result["mixing"] = mixing_overhead(rows, args.E)
        write_json(args.json, result)
        release_memory()
    plot_linear(result, args.json.with_suffix(".png"))
    return 1 if any(case.startswith("vllm_bmos:") for case in wrong) else 0


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; `shapes` becomes a list of (K, N)."""
    parser = common_parser(__doc__.splitlines()[0], "linear.json")
    names = ", ".join(SHAPES)
    parser.add_argument(
        "--shapes", nargs="+", default=["llama-7b"], metavar="S", help=f"{names}, or KxN"
    )
    parser.add_argument("--M", nargs="+", type=positive_int, default=[1, 4, 16, 64, 256, 512])
    parser.add_argument("--E", type=positive_int, default=4, help="experts of our layer")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="dtype of x and y")
    parser.add_argument("--providers", nargs="+", choices=NAMES, default=list(NAMES), metavar="P")
    parser.add_argument("--rounds", type=positive_int, default=8, help="interleaved repetitions")
    parser.add_argument(
        "--quick", action="store_true", help="two shapes, M = 1 and 512, under a minute"
    )
    args = parser.parse_args(arguments)
    if args.quick:
        for name, value in (("shapes", QUICK_SHAPES), ("M", QUICK_M), ("rounds", 4)):
            if getattr(args, name) != parser.get_default(name):
                parser.error(f"--quick sets --{name}; leave one out")
            setattr(args, name, value)
    try:
        args.shapes = [shape for name in args.shapes for shape in parse_shape(name)]
    except ValueError as error:
        parser.error(str(error))
    return args


def parse_shape(name: str) -> list[tuple[int, int]]:
    """(K, N) pairs of a model's name or of "KxN".

    Raises:
        ValueError: if it is neither.
    """
    if name in SHAPES:
        return SHAPES[name]
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", name)
    if not match:
        raise ValueError(f"--shapes: expected {', '.join(SHAPES)} or KxN, found {name!r}")
    return [(int(match[1]), int(match[2]))]


def usable_peers(names: list[str], E: int, device: str) -> tuple[list[Peer], dict[str, str]]:
    """The named peers that run here, and why each of the others does not."""
    usable, missing = [], {}
    for peer in all_peers(E):
        if peer.name not in names:
            continue
        reason = peer.unavailable() if device in peer.devices else f"does not run on {device}"
        if reason is None:
            usable.append(peer)
        else:
            missing[peer.name] = reason
            logger.warning("missing: %s: %s", peer.name, reason)
    return usable, missing


def bench_shape(
    weights: Weights,
    peers: list[Peer],
    args: argparse.Namespace,
    timer: Timer,
    wrong: list[str],
) -> Iterator[dict[str, Any]]:
    """Check, then time every case of one shape; the messages of wrong results go to `wrong`."""
    loaded = dict(load_cases(weights, peers, wrong))
    warm_up_seconds = QUICK_WARM_UP_SECONDS if args.quick else WARM_UP_SECONDS
    patience = QUICK_PATIENCE_SECONDS if args.quick else PATIENCE_SECONDS
    x = weights.activations(max(args.M))
    truths = {
        E: weights.layer_truth(x, E) if E else weights.product_truth(x)
        for E in {case.E for case in loaded}
    }
    for M in args.M:
        for hot in (False, True) if M <= HOT_M else (False,):
            rings: dict[Case, Ring] = {}
            errors: dict[Case, float] = {}
            for case, copies in loaded.items():
                try:
                    ring = copies.ring(x[:M], hot)
                    errors[case] = relative_error(ring, truths[case.E][:M])
                    if errors[case] <= case.mode.tolerance:
                        rings[case] = warm_up(ring, warm_up_seconds)
                        continue
                except Exception as error:
                    note_failure(error, f"{case} K={weights.K} N={weights.N} M={M}", wrong)
                    continue
                wrong.append(
                    f"{case} K={weights.K} N={weights.N} M={M}: relative error "
                    f"{errors[case]:.2e} is above {case.mode.tolerance:.0e}; not timed"
                )
                logger.error("wrong result: %s", wrong[-1])

            def failed(case: Case, error: Exception, M: int = M) -> None:
                note_failure(error, f"{case} K={weights.K} N={weights.N} M={M}", wrong)

            timed = time_interleaved(rings, timer, args.rounds, patience, failed)
            for case, summary in timed.items():
                plain = {"call_us": plain_call_us(rings[case])} if weights.device != "cpu" else {}
                yield {
                    "provider": case.provider,
                    "mode": case.mode.name,
                    "K": weights.K,
                    "N": weights.N,
                    "M": M,
                    "E": case.E,
                    "dtype": str(weights.dtype).removeprefix("torch."),
                    "weights": "hot" if hot else "cold",
                    **asdict(summary),
                    **plain,
                    "relative_error": float(f"{errors[case]:.3g}"),
                    "bits": case.mode.bits,
                    "arithmetic": case.mode.arithmetic,
                }


def release_memory() -> None:
    """Give the freed copies of one shape back to the system before the next shape's are made."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library needs no such call
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def note_failure(error: Exception, what: str, wrong: list[str]) -> None:
    """Add a peer's failure to the wrong results; our own is raised again."""
    if what.startswith("vllm_bmos:"):
        raise error
    reason = str(error).strip().splitlines()[:1]
    wrong.append(f"{what}: {type(error).__name__}: {''.join(reason)}; not timed")
    logger.error("failed: %s", wrong[-1])


def load_cases(
    weights: Weights, peers: list[Peer], wrong: list[str]
) -> Iterator[tuple[Case, Loaded]]:
    """Load every case's copies: together more than the caches hold (but for tiny layers)."""
    host_cache = cache_sizes().get("L3", 0) if weights.device == "cpu" else 0
    cold_bytes = max(MIN_COLD_BYTES, host_cache * 11 // 10)
    for peer in peers:
        for mode in peer.modes(weights):
            copy_bytes = weights.K * weights.N * mode.bits / 8
            copies = min(MAX_COPIES, 1 + int(cold_bytes / copy_bytes))
            for E in peer.experts(mode):
                case = Case(peer.name, mode, E)
                logger.info("%dx%d: loading %d x %s", weights.K, weights.N, copies, case)
                try:
                    loaded = peer.load(weights, mode, copies, E)
                except Exception as error:
                    note_failure(error, f"{case} K={weights.K} N={weights.N}", wrong)
                else:
                    yield case, loaded


def relative_error(ring: Ring, truth: torch.Tensor) -> float:
    """The larger ||y - truth|| / ||truth|| of the ring's first and last call; inf for NaN."""
    errors = []
    for index in {0, len(ring.calls) - 1}:
        y = ring.result(index).to(truth)
        error = (torch.linalg.norm(y - truth) / torch.linalg.norm(truth)).item()
        errors.append(error if error == error else float("inf"))
    return max(errors)


def rates(row: dict[str, Any], limits: dict[str, float]) -> dict[str, float]:
    """Memory and arithmetic rates of a row, and their percentage of the measured limits."""
    M, N, K, E = row["M"], row["N"], row["K"], row["E"]
    scales = 2 * E * (2 * K + N)  # in-scales, router and out-scales, 16 bit
    activations = torch.finfo(DTYPES[row["dtype"]]).bits // 8 * M * (K + N)
    gbs = (K * N * row["bits"] / 8 + scales + activations) / row["median_us"] / 1e3
    gflops = 2 * M * N * K / row["median_us"] / 1e3
    unit = "gops" if row["arithmetic"] == "int8" else "gflops"
    return {
        "gbs": round(gbs, 2),
        "read_percent": round(100 * gbs / limits["read_gbs"], 1),
        "gflops": round(gflops, 1),
        "arithmetic_percent": round(100 * gflops / limits[f"{row['arithmetic']}_{unit}"], 1),
    }


def mixing_overhead(rows: list[dict[str, Any]], E: int) -> list[dict[str, Any]]:
    """What mixing E experts costs over one expert, in percent, for each shape, M and place."""

    def place(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["K"], row["N"], row["M"], row["weights"]

    ours = [r for r in rows if r["provider"] == "vllm_bmos" and r["mode"] == "default"]
    single = {place(row): row["median_us"] for row in ours if row["E"] == 1}
    return [
        {
            **{key: row[key] for key in ("K", "N", "M", "weights")},
            "E": E,
            "overhead_percent": round(100 * (row["median_us"] / single[place(row)] - 1), 1),
        }
        for row in ours
        if row["E"] == E != 1 and place(row) in single
    ]


def print_table(rows: list[dict[str, Any]], K: int, N: int) -> None:
    """Print one shape's medians: a line for each case, a column for each M."""
    chosen = [row for row in rows if (row["K"], row["N"]) == (K, N)]
    columns = list(dict.fromkeys((row["M"], row["weights"]) for row in chosen))
    lines: dict[str, dict[Any, float]] = {}
    for row in chosen:
        name = f"{row['provider']}:{row['mode']}" + (f":E={row['E']}" if row["E"] else "")
        lines.setdefault(name, {})[row["M"], row["weights"]] = row["median_us"]
    print(f"\nK={K} N={N}: median microseconds")
    print(f"{'':26}" + "".join(f"{f'M={M} {place}':>12}" for M, place in columns))
    for name, times in lines.items():
        cells = (
            f"{times[column]:12.1f}" if column in times else f"{'-':>12}" for column in columns
        )
        print(f"{name:26}" + "".join(cells))
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
