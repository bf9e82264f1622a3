"""Holds results against the bars the project set itself; prints a Markdown table.

    python benchmarks/bars.py --linear FILE --serving FILE

The bars that name times were set on another processor (Zen 5, 65-70 GB/s); the machine of the
results is printed above the table.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from harness import RESULTS

PAPER_M1 = {(4096, 4096): 50, (4096, 11008): 110, (11008, 4096): 125}  # microseconds
Bar = tuple[str, str, str, bool]  # what, bar, measured, met


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--linear", type=Path, default=RESULTS / "linear.json")
    parser.add_argument("--serving", type=Path, default=RESULTS / "serving.json")
    args = parser.parse_args()
    bars: list[Bar] = []
    for path, read in ((args.linear, linear_bars), (args.serving, serving_bars)):
        if path.exists():
            result = json.loads(path.read_text())
            machine = result["machine"]
            print(
                f"{path.name}: {machine['cpu']}, {machine['threads']} threads, "
                f"{machine['limits']['read_gbs']} GB/s, commit {machine['commit']}\n"
            )
            bars += read(result)
    print("| what | bar | measured | met |\n| --- | --- | --- | --- |")
    for what, bar, measured, met in bars:
        print(f"| {what} | {bar} | {measured} | {'yes' if met else 'no'} |")


def linear_bars(result: dict[str, Any]) -> Iterator[Bar]:
    """The bars of one layer, for every shape of the results."""
    rows = {
        (row["provider"], row["mode"], row["E"], row["K"], row["N"], row["M"]): row
        for row in result["rows"]
        if row["weights"] == "cold"
    }
    shapes = list(dict.fromkeys(key[3:5] for key in rows))
    Ms = sorted({key[5] for key in rows})

    def ours(mode: str, K: int, N: int, M: int) -> dict[str, Any]:
        return rows["vllm_bmos", mode, 4, K, N, M]

    def gain(mode: str, K: int, N: int, M: int) -> float:
        found = [row for key, row in rows.items() if key[0] == "vllm_bf16" and key[3:] == (K, N, M)]
        if not found:
            raise SystemExit(f"--linear: no row of vllm_bf16 at K={K} N={N} M={M} to compare with")
        (dense,) = found
        return float(dense["median_us"] / ours(mode, K, N, M)["median_us"])

    def each(value: Callable[[int, int], float], shown: str) -> str:
        return ", ".join(f"{K}x{N}: {value(K, N):{shown}}" for K, N in shapes)

    overhead = result.get("call_overhead_us")
    if overhead is not None:
        yield (
            "overhead of a call, beside a 40 us kernel",
            "<= 4 us",
            f"{overhead} us",
            overhead <= 4,
        )
    if 1 in Ms:
        gains = [gain("default", K, N, 1) for K, N in shapes]
        text = each(lambda K, N: gain("default", K, N, 1), ".1f")
        yield "M=1 cold, over vLLM bf16", ">= 8", text, min(gains) >= 8
        for (K, N), bar in PAPER_M1.items():
            if (K, N) in shapes:
                us = ours("default", K, N, 1)["median_us"]
                yield f"M=1 cold {K}x{N}", f"<= {bar} us", f"{us:.0f} us", us <= bar
        percents = [ours("default", K, N, 1)["read_percent"] for K, N in shapes]
        text = each(lambda K, N: ours("default", K, N, 1)["read_percent"], ".0f")
        yield "M=1 cold, % of the read rate", ">= 70", text, min(percents) >= 70
    for M, bar in ((1, 5), *((M, 3) for M in Ms if M >= 16)):
        found = [m for m in result["mixing"] if m["M"] == M and m["weights"] == "cold"]
        if found:
            worst = max(m["overhead_percent"] for m in found)
            yield f"E=4 over E=1, M={M}", f"<= {bar} %", f"at most {worst} %", worst <= bar
    for M in Ms:
        if 1 < M < 512:
            worst = min(gain("default", K, N, M) for K, N in shapes)
            yield f"M={M}, over vLLM bf16", "> 1", f"at least {worst:.2f}", worst > 1
    if 512 in Ms:
        for mode, ratio in (("default", 1.0), ("int8", 1.9)):
            worst = min(gain(mode, K, N, 512) for K, N in shapes)
            what = f"M=512 {mode}, over vLLM bf16"
            yield what, f">= {ratio}", f"at least {worst:.2f}", worst >= ratio


def serving_bars(result: dict[str, Any]) -> Iterator[Bar]:
    """The bars of a served 7B model."""
    rows = {(row["provider"], row["mode"]): row for row in result["rows"]}
    ours = rows["vllm_bmos", "default"]
    decode = ours["decode_tokens_per_s"]["1"]
    yield "7B decode, batch 1", ">= 30 tokens/s", f"{decode:.1f}", decode >= 30
    for (provider, mode), bar in ((("llama_cpp", "q1_0"), 3), (("vllm_bf16", "bfloat16"), 7)):
        if (provider, mode) in rows:
            ratio = decode / rows[provider, mode]["decode_tokens_per_s"]["1"]
            yield f"over {provider} {mode}", f">= {bar}", f"{ratio:.1f}", ratio >= bar
    if ("vllm_bf16", "bfloat16") in rows:
        dense = rows["vllm_bf16", "bfloat16"]["prefill_tokens_per_s"]
        prefill = ours["prefill_tokens_per_s"]
        yield "7B prefill 512", f">= {dense} tokens/s (vLLM bf16)", str(prefill), prefill >= dense
    memory, load = ours["resident_beyond_vllm_gb"], ours["weights_seconds"]
    yield "memory beyond vLLM and KV cache", "<= 1.6 GB", f"{memory} GB", memory <= 1.6
    if load is not None:
        yield "weights read and laid out", "<= 10 s", f"{load} s", load <= 10


if __name__ == "__main__":
    main()
