"""How fast is a 7B model? BinaryMoS in vLLM beside dense vLLM and llama.cpp, on this machine.

    python benchmarks/serving.py --json FILE

Makes a LLaMA-2-7B-shaped model with random signs and scales, serves it with `vllm serve` and loads
it with `vllm bench serve`. Dense bf16 is served with a few layers and extrapolated to all of them,
as its time is linear in the layers; llama.cpp runs the same shape in Q1_0 and Q4_0.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness import (
    common_parser,
    logger,
    machine_facts,
    positive_int,
    print_facts,
    start,
    write_json,
)
from limits import measure_limits
from make_model import (
    SHAPES,
    Shape,
    add_model_flags,
    kept_bmos_model,
    make_bmos_model,
    with_layers,
    write_config,
    write_tokenizer,
)
from peers.llama_cpp_linear import LlamaCpp
from vllm_bench import Load, measure_server

PROVIDERS = ("vllm_bmos", "vllm_bf16", "llama_cpp")
IN_8_BITS = "8-bit embeddings"  # the mode of the rows that have them
EMBEDDINGS_ENV = "VLLM_BMOS_EMBEDDINGS"
LLAMA_TYPES = ("q1_0", "q4_0")


class PeerError(RuntimeError):
    """Another project's program failed; its own message follows."""


def main() -> int:
    """Run the command line."""
    args = parse_args()
    start(args.threads)
    machine = machine_facts(args.threads)
    print_facts(machine)
    machine["limits"] = measure_limits("cpu")
    shape = with_layers(SHAPES[args.shape], args.layers)
    args.work.mkdir(parents=True, exist_ok=True)
    load = Load(args.batch, args.prompt, args.output, args.threads, options=args.serve_options)
    result: dict[str, Any] = {
        "machine": machine,
        "model": {"shape": args.shape, "layers": shape.num_hidden_layers, "E": args.E},
        "load": {"batches": args.batch, "prompt": args.prompt, "output": args.output},
        "missing": {},
        "rows": [],
    }
    for row in bench(shape, args, load, result["missing"]):
        result["rows"].append(row)
        write_json(args.json, result)  # each row takes minutes: none is lost with the next
    write_json(args.json, result)  # what is missing may be known only after the last row
    print_table(result["rows"])
    return 0


def bench(
    shape: Shape, args: argparse.Namespace, load: Load, missing: dict[str, str]
) -> Iterator[dict[str, Any]]:
    """The row of each provider that runs here; the reasons of the others go to `missing`."""
    if "vllm_bmos" in args.providers:
        yield from bench_bmos(shape, args, load)
    if "vllm_bf16" in args.providers:
        yield bench_bf16(shape, args, load)
    if "llama_cpp" in args.providers:
        reason = LlamaCpp().unavailable()
        if reason is None:
            for type_name in LLAMA_TYPES:
                try:
                    yield bench_llama_cpp(type_name, args)
                except PeerError as error:
                    missing[f"llama_cpp {type_name}"] = str(error)
                    logger.warning("missing: llama_cpp %s: %s", type_name, error)
        else:
            missing["llama_cpp"] = reason
            logger.warning("missing: llama_cpp: %s", reason)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = common_parser(__doc__.splitlines()[0], "serving.json")
    add_model_flags(parser)
    parser.add_argument("--batch", nargs="+", type=positive_int, default=[1, 4, 16])
    parser.add_argument("--prompt", type=positive_int, default=512, help="tokens of the prefill")
    parser.add_argument("--output", type=positive_int, default=64, help="tokens decoded a request")
    parser.add_argument(
        "--bf16-layers",
        nargs=2,
        type=positive_int,
        default=[2, 6],
        help="two depths of the dense model, from which its full depth is extrapolated",
    )
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument(
        "--serve-options", nargs=argparse.REMAINDER, default=[], help="for `vllm serve`"
    )
    return parser.parse_args(arguments)


def bench_bmos(shape: Shape, args: argparse.Namespace, load: Load) -> Iterator[dict[str, Any]]:
    """BinaryMoS served by vLLM, with embeddings and lm_head as they are and in 8 bits.

    Memory is beside that of a tiny model, which is vLLM's own, when the server is ready and after
    all requests.

    The first start compiles the model and fills vLLM's cache; what is measured is a start after it,
    but for the `first_` values.
    """
    model = kept_bmos_model(args.work, args.shape, shape, args.E)
    tiny = args.work / f"tiny-E{args.E}"
    make_bmos_model(tiny, SHAPES["tiny"], args.E)
    logger.info("serving %s and %s", tiny, model)
    tiny_first, tiny_next = (
        measure_server(tiny, load, [], args.work, rates=False) for _ in range(2)
    )

    def beyond(ours: dict[str, Any], vllm: dict[str, Any], what: str = "resident_bytes") -> float:
        return round((ours[what] - vllm["resident_bytes"]) / 1e9, 3)

    for mode, embeddings in (("default", ""), (IN_8_BITS, "int8")):
        set_for_mode = {EMBEDDINGS_ENV: embeddings}
        first = measure_server(model, load, [], args.work, rates=False, env=set_for_mode)
        found = measure_server(model, load, [], args.work, env=set_for_mode)
        yield {
            "provider": "vllm_bmos",
            "mode": mode,
            "first_ready_seconds": first["ready_seconds"],
            "first_resident_beyond_vllm_gb": beyond(first, tiny_first),
            "resident_gb": round(found["resident_bytes"] / 1e9, 3),
            "resident_beyond_vllm_gb": beyond(found, tiny_next),
            "loaded_beyond_vllm_gb": beyond(found, tiny_next, "loaded_bytes"),
            **{key: value for key, value in found.items() if not key.endswith("_bytes")},
        }


def bench_bf16(shape: Shape, args: argparse.Namespace, load: Load) -> dict[str, Any]:
    """Dense vLLM at two depths; seconds per step and per prefill are extrapolated linearly."""
    found: dict[int, dict[str, Any]] = {}
    for layers in args.bf16_layers:
        model = args.work / f"{args.shape}-{layers}-bf16"
        shutil.rmtree(model, ignore_errors=True)
        model.mkdir()
        write_config(model, with_layers(shape, layers), None)
        write_tokenizer(model, shape.vocab_size)
        logger.info("serving %s", model)
        found[layers] = measure_server(model, load, ["--load-format", "dummy"], args.work)
    few, many = sorted(found)

    def at_full_depth(rate: float, other: float) -> float:
        per_layer = (1 / other - 1 / rate) / (many - few)
        return round(1 / (1 / rate + per_layer * (shape.num_hidden_layers - few)), 2)

    decode = [found[layers]["decode_tokens_per_s"] for layers in (few, many)]
    prefill = [found[layers]["prefill_tokens_per_s"] for layers in (few, many)]
    prefill_rate = at_full_depth(*prefill)
    return {
        "provider": "vllm_bf16",
        "mode": "bfloat16",
        "extrapolated_from_layers": [few, many],
        "measured": {str(layers): value for layers, value in found.items()},
        "decode_tokens_per_s": {B: at_full_depth(decode[0][B], decode[1][B]) for B in decode[0]},
        "prefill_tokens_per_s": prefill_rate,
        "ttft_ms": round(1e3 * args.prompt / prefill_rate, 1),
    }


def bench_llama_cpp(type_name: str, args: argparse.Namespace) -> dict[str, Any]:
    """llama.cpp on the same shape, in a process of its own."""
    command = [sys.executable, str(Path(__file__).with_name("llama_bench.py"))]
    command += ["--shape", args.shape, "--type", type_name, "--work", str(args.work)]
    command += ["--prompt", str(args.prompt), "--output", str(args.output)]
    command += ["--threads", str(args.threads), "--batch", *map(str, args.batch)]
    if args.layers is not None:
        command += ["--layers", str(args.layers)]
    logger.info("llama.cpp %s", type_name)
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        raise PeerError(
            f"llama_bench.py failed with status {run.returncode} (-9: killed, as when memory is "
            f"short; -11: a segmentation fault): {run.stderr[-2000:]}"
        )
    return {"provider": "llama_cpp", "mode": type_name, **json.loads(run.stdout)}


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print one line for each provider."""
    batches = list(rows[0]["decode_tokens_per_s"]) if rows else []
    print(f"{'tokens/s':24}" + "".join(f"{'batch ' + B:>10}" for B in batches) + f"{'prefill':>10}")
    for row in rows:
        cells = [row["decode_tokens_per_s"][B] for B in batches] + [row["prefill_tokens_per_s"]]
        name = f"{row['provider']}:{row['mode']}"
        print(f"{name:24}" + "".join(f"{cell:10.2f}" for cell in cells))


if __name__ == "__main__":
    sys.exit(main())
