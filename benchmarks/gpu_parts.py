"""How long does each kernel of a layer take on this GPU? What benchmarks/gpu_model.py predicts.

    python benchmarks/gpu_parts.py --json FILE

Weights are cold, as in benchmarks/linear.py. "layer_us" is a call inside a CUDA graph; the kernels'
own times are the profiler's, without the gaps between them. Kernels that are not ours are torch's
sum of `even_parts` or the vendor's GEMM.
"""

import argparse
import sys
from typing import Any

import torch
from harness import DTYPES, common_parser, logger, machine_facts, positive_int, start, write_json
from linear import MIN_COLD_BYTES, SHAPES, parse_shape
from peers import Weights
from peers.bmos import Bmos
from timing import CudaTimer, Ring, kernels_us, plain_call_us, summarize

OURS = ("route", "logits", "scale", "gemm", "dequant", "finish")
COPIES = 64  # enough to be cold up to this many, and for the profiler not to hold too much


def main() -> int:
    """Run the command line; return 1 without a GPU."""
    args = parse_args()
    start(args.threads)
    if not torch.cuda.is_available():
        logger.error("no CUDA GPU")
        return 1
    rows = []
    peer = Bmos(args.E)
    for K, N in args.shapes:
        weights = Weights.random(K, N, DTYPES[args.dtype], "cuda")
        copies = min(COPIES, 1 + MIN_COLD_BYTES // (K * N // 8))
        loaded = peer.load(weights, peer.modes(weights)[0], copies, args.E)
        for M in args.M:
            row = {"K": K, "N": N, "M": M, "E": args.E, "dtype": args.dtype}
            rows.append(row | measure(loaded.ring(weights.activations(M), hot=False)))
            print(rows[-1], flush=True)
    write_json(args.json, {"machine": machine_facts(args.threads), "rows": rows})
    return 0


def parse_args() -> argparse.Namespace:
    """Parse the command line; `shapes` becomes a list of (K, N)."""
    parser = common_parser(__doc__.splitlines()[0], "gpu_parts.json")
    names = ", ".join(SHAPES)
    parser.add_argument(
        "--shapes", nargs="+", default=["llama-7b"], metavar="S", help=f"{names}, or KxN"
    )
    parser.add_argument("--M", nargs="+", type=positive_int, default=[1, 16, 256, 2048])
    parser.add_argument("--E", type=positive_int, default=4, help="experts of the layer")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="dtype of x and y")
    args = parser.parse_args()
    args.shapes = [shape for name in args.shapes for shape in parse_shape(name)]
    return args


def measure(ring: Ring) -> dict[str, Any]:
    """Times of one layer: in a graph, as a plain call, and kernel by kernel."""
    in_graph = summarize(CudaTimer().sampler(ring)())
    by_kernel: dict[str, float] = {}
    plain = plain_call_us(ring)
    for name, us in kernels_us(ring).items():
        other = "sum" if "at::native::reduce_kernel" in name else "vendor gemm"
        key = name if name in OURS else other
        by_kernel[key] = round(by_kernel.get(key, 0.0) + us, 3)
    return {"layer_us": in_graph.median_us, "call_us": plain, "kernels_us": by_kernel}


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main())
