"""What should the GPU kernels cost? A model, not a measurement: no GPU is involved.

    python benchmarks/gpu_model.py --json FILE

The real launcher's launches are compiled for each GPU, and their machine code is counted. A launch
takes as long as its busiest resource: DRAM bytes, instruction issue, the integer pipes, the tensor
cores, or the chain of dependent tensor-core instructions, on the multiprocessor that gets most
programs, after one DRAM latency. The rates are the makers' published ones; ASSUMED holds the rest.
Beside it stand float16's roofline and the times that the paper measured on an RTX A6000. A table
and a plot of M = 1 are written beside the JSON.

    python benchmarks/gpu_model.py --measured gpu_parts.json --json FILE

sets what benchmarks/gpu_parts.py measured beside the model of that GPU, kernel by kernel.
"""

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from harness import common_parser, logger, machine_facts, positive_int, start, write_json

from vllm_bmos.kernels.triton import aot, launch

E = 4
DTYPE = "float16"
DEFAULT_M = [1, 16, 256, 2048]
SCALE_BYTES = 2
ACTIVATION_BYTES = 2
MMA_FLOPS = {"HMMA": 2 * 16 * 8 * 16}
ASSUMED = {
    "dram_efficiency": 0.92,  # of the published bandwidth
    "vendor_gemm_efficiency": 0.8,  # of the published tensor-core rate
    "dram_latency_us": 0.6,  # from a kernel's start to its first data
    "launch_us": 1.0,  # from one kernel's end to the next one's start, inside a CUDA graph
    "mma_latency_cycles": 33,  # of dependent tensor-core instructions
    "l2_bytes_per_cycle": 64,  # into one multiprocessor
}
# Integer instructions run on 16 lanes of a scheduler: two cycles each (CUDA programming guide).
LOGIC_PIPE = r"LOP3|ISETP|SEL|IADD|VIADD|SHF|LEA|PLOP3|PRMT|MOV"
MULTIPLY_PIPE = r"IMAD|FFMA|FMUL|FADD"
SCHEDULERS = 4

# Microseconds of one linear layer at M = 1, measured by the paper on an RTX A6000 (table 6).
PAPER = {
    (4096, 4096): {"fp16": 68.2, "binarymos": 34.5},
    (4096, 11008): {"fp16": 151.7, "binarymos": 36.9},
    (11008, 4096): {"fp16": 143.5, "binarymos": 37.0},
    (5120, 5120): {"fp16": 95.6, "binarymos": 35.6},
    (5120, 13824): {"fp16": 224.1, "binarymos": 43.4},
    (13824, 5120): {"fp16": 213.6, "binarymos": 44.5},
}


@dataclass(frozen=True)
class Gpu:
    """Published figures of a GPU.

    Attributes:
        arch: compute capability without its dot.
        sms: multiprocessors.
        ghz: boost clock.
        dram_gbs: memory bandwidth in GB/s.
        tflops: dense float16 products with float32 sums, in TFLOP/s.
        shared: bytes of shared memory of a multiprocessor.
    """

    arch: int
    sms: int
    ghz: float
    dram_gbs: float
    tflops: float
    shared: int


GPUS = {
    "RTX A6000": Gpu(86, 84, 1.80, 768, 154.8, 100 << 10),
    "RTX 4090": Gpu(89, 128, 2.52, 1008, 165.2, 100 << 10),
    "A100-80 SXM": Gpu(80, 108, 1.41, 2039, 312.0, 164 << 10),
    "H100 SXM": Gpu(90, 132, 1.83, 3350, 989.4, 228 << 10),
}
# The same for those that are only compared with a measurement. By what the driver calls a GPU.
DRIVER_NAMES = {
    "NVIDIA H100 80GB HBM3": GPUS["H100 SXM"],
    "NVIDIA H200": replace(GPUS["H100 SXM"], dram_gbs=4800),
}


@dataclass(frozen=True)
class Shape:
    """One linear layer call."""

    K: int
    N: int
    M: int

    @property
    def sign_bytes(self) -> float:
        """The packed signs."""
        return self.K * self.N / 8

    @property
    def scale_bytes(self) -> int:
        """In-scales, router and out-scales."""
        return SCALE_BYTES * E * (2 * self.K + self.N)

    @property
    def activation_bytes(self) -> int:
        """The layer's x and y."""
        return ACTIVATION_BYTES * self.M * (self.K + self.N)


def main() -> int:
    """Run the command line."""
    parser = common_parser(__doc__.splitlines()[0], "gpu_model.json")
    parser.add_argument(
        "--M",
        nargs="+",
        type=positive_int,
        default=argparse.SUPPRESS,
        help=f"of the model alone (default: {DEFAULT_M})",
    )
    parser.add_argument("--measured", type=Path, metavar="FILE", help="a result of gpu_parts.py")
    args = parser.parse_args()
    start(args.threads)
    if args.measured:
        if "M" in args:
            parser.error("--M: with --measured the rows are those of FILE; leave one of them out")
        if args.json == parser.get_default("json"):
            parser.error(f"--measured: {args.json} has the model alone; give another --json FILE")
        try:
            result = parts_of(args.measured)
        except (OSError, ValueError) as error:
            parser.error(f"--measured {args.measured}: {error}")
        return compare(result, args.json)
    rows = [
        row
        for name, gpu in GPUS.items()
        for M in getattr(args, "M", DEFAULT_M)
        for row in model_rows(name, gpu, [Shape(K, N, M) for K, N in PAPER])
    ]
    result = {
        "machine": machine_facts(args.threads),
        "note": "a model from machine code and published rates, not a measurement",
        "assumed": ASSUMED,
        "gpus": {name: asdict(gpu) for name, gpu in GPUS.items()},
        "rows": rows,
    }
    write_json(args.json, result)
    table = markdown(rows)
    print(table)
    args.json.with_suffix(".md").write_text(table, encoding="utf-8")
    plot(rows, args.json.with_suffix(".png"))
    return 0


def model_rows(name: str, gpu: Gpu, shapes: list[Shape]) -> Iterator[dict[str, Any]]:
    """The predictions of one GPU, a row a shape."""
    for shape in shapes:
        launches = aot.layer_launches(gpu.arch, shape.M, shape.K, (shape.N,), E)
        parts = [predict(recorded, gpu, shape) for recorded in launches]
        parts += [
            {"kernel": "vendor gemm", "us": vendor_gemm_us(gpu, part_of(recorded, shape))}
            for recorded in launches
            if recorded.name == "finish"
        ]
        gemm = next((part for part in parts if part["kernel"] == "gemm"), None)
        roof = memory_roof_us(gpu, shape)
        total = sum(part["us"] for part in parts) + ASSUMED["launch_us"] * len(parts)
        row = {
            "gpu": name,
            **asdict(shape),
            "fp16_roofline_us": max(
                (2 * shape.N * shape.K + shape.activation_bytes) / gpu.dram_gbs / 1e3,
                flops_us(gpu, shape, 1),
            ),
            "fp16_us": vendor_gemm_us(gpu, shape) + ASSUMED["launch_us"],
            "paper_fp16_us": PAPER[shape.K, shape.N]["fp16"] if measured(name, shape) else None,
            "paper_binarymos_us": (
                PAPER[shape.K, shape.N]["binarymos"] if measured(name, shape) else None
            ),
            "memory_roof_us": roof,
            "gemm_us": gemm["us"] if gemm else None,
            "gemm_bound": gemm["bound"] if gemm else None,
            "gemm_over_roof": gemm["us"] / roof if gemm else None,
            "layer_us": total,
            "parts": [rounded(part) for part in parts],
        }
        logger.info("%s K=%d N=%d M=%d: %.2f us", name, shape.K, shape.N, shape.M, total)
        yield rounded(row)


def parts_of(path: Path) -> dict[str, Any]:
    """A result of gpu_parts.py.

    Raises:
        ValueError: it is something else, or of a GPU or layer that is not modelled here.
    """
    result = json.loads(path.read_text())
    try:
        gpu, rows = result["machine"].get("gpu"), list(result["rows"])
    except (KeyError, TypeError, AttributeError):
        raise ValueError("expected a result of gpu_parts.py, with machine and rows") from None
    if gpu not in DRIVER_NAMES:
        raise ValueError(f"machine.gpu: expected one of {sorted(DRIVER_NAMES)}, found {gpu!r}")
    if not rows:
        raise ValueError("rows: expected one at least, found none")
    for index, row in enumerate(rows):
        if not isinstance(row, dict) or "kernels_us" not in row:
            raise ValueError(f"rows[{index}]: expected a row of gpu_parts.py, found {row}")
        if (row["E"], row["dtype"]) != (E, DTYPE):
            found = f"E = {row['E']} and {row['dtype']}"
            raise ValueError(f"rows[{index}]: expected E = {E} and {DTYPE}, found {found}")
    return {"machine": result["machine"], "rows": rows}


def compare(measured: dict[str, Any], path: Path) -> int:
    """Write and print what was measured beside the model of that GPU, a line a kernel."""
    name = measured["machine"]["gpu"]
    gpu = DRIVER_NAMES[name]
    rows = []
    for row in measured["rows"]:
        shape = Shape(row["K"], row["N"], row["M"])
        (model,) = model_rows(name, gpu, [shape])
        expected: dict[str, float] = {}
        for part in model["parts"]:
            expected[part["kernel"]] = expected.get(part["kernel"], 0.0) + part["us"]
        parts = {
            kernel: {"model_us": round(us, 3), "measured_us": row["kernels_us"].get(kernel)}
            for kernel, us in expected.items()
        }
        parts["layer"] = {"model_us": model["layer_us"], "measured_us": row["layer_us"]}
        rows.append({**asdict(shape), "gemm_bound": model["gemm_bound"], "parts": parts})
    lines = [f"| {name}: K x N | M | kernel | model | measured |", "|---|--:|---|--:|--:|"]
    for row in rows:
        for kernel, times in row["parts"].items():
            figures = [f"{us:.2f}" if us is not None else "-" for us in times.values()]
            place = f"| {row['K']} x {row['N']} | {row['M']} | {kernel} | "
            lines.append(place + " | ".join(figures) + " |")
    write_json(path, {"gpu": name, "assumed": ASSUMED, "model": asdict(gpu), "rows": rows})
    table = "\n".join(lines) + "\n"
    print(table)
    path.with_suffix(".md").write_text(table, encoding="utf-8")
    return 0


def part_of(recorded: aot.Launch, shape: Shape) -> Shape:
    """The part of the layer that a launch computes: the large path goes by parts of N."""
    if recorded.name == "dequant":
        return replace(shape, N=recorded.grid[0] * recorded.options["BN"])
    if recorded.name == "finish":
        return replace(shape, N=recorded.args[8])
    return shape


def measured(name: str, shape: Shape) -> bool:
    """Whether the paper timed this."""
    return name == "RTX A6000" and shape.M == 1


def memory_roof_us(gpu: Gpu, shape: Shape) -> float:
    """The layer's bytes at the published bandwidth."""
    total = shape.sign_bytes + shape.scale_bytes + shape.activation_bytes
    return total / gpu.dram_gbs / 1e3


def flops_us(gpu: Gpu, shape: Shape, efficiency: float) -> float:
    """The product at a part of the published tensor-core rate."""
    return 2 * shape.M * shape.N * shape.K / gpu.tflops / 1e6 / efficiency


def vendor_gemm_us(gpu: Gpu, shape: Shape) -> float:
    """A dense float16 GEMM."""
    bytes_moved = 2 * shape.N * shape.K + shape.activation_bytes
    dram = bytes_moved / gpu.dram_gbs / 1e3 / ASSUMED["dram_efficiency"]
    busy = flops_us(gpu, shape, ASSUMED["vendor_gemm_efficiency"])
    return max(dram, busy) + ASSUMED["dram_latency_us"]


def predict(recorded: aot.Launch, gpu: Gpu, shape: Shape) -> dict[str, Any]:
    """The time of one launch and the resource that bounds it."""
    sass = aot.compile_sass(recorded, gpu.arch)
    warps = recorded.options.get("num_warps", 4)
    programs = math.prod(recorded.grid)
    resident = min(gpu.shared // (sass.shared + 1024), 65536 // (sass.registers * 32 * warps), 16)
    on_busiest = -(-programs // gpu.sms)
    shape = part_of(recorded, shape)
    bounds = {"DRAM": dram_bytes(recorded.name, shape) / gpu.dram_gbs / 1e3}
    bounds["DRAM"] /= ASSUMED["dram_efficiency"]
    latencies = 1.0
    facts: dict[str, Any] = {}
    if recorded.name == "gemm":
        BKW = recorded.options["BKW"]
        steps = -(-launch.round_up(shape.K, 128) // 16 // BKW)
        warps_on_scheduler = max(1, -(-on_busiest * warps // SCHEDULERS))
        cycles = warps_on_scheduler * steps
        tensor = sum(
            count * mma_cycles(opcode, gpu, recorded.options["BM"])
            for opcode, count in sass.mmas(sass.loop).items()
        )
        chain = sass.count("HMMA", sass.loop) / independent_mmas(recorded.options)
        chain *= ASSUMED["mma_latency_cycles"] * steps * -(-on_busiest // max(1, resident))
        clock = gpu.ghz * 1e3
        bounds |= {
            "issue": len(sass.loop) * cycles / clock,
            "logic": 2 * sass.count(LOGIC_PIPE, sass.loop) * cycles / clock,
            "L2": on_busiest * program_bytes(recorded.options, shape) / l2_rate(gpu),
            "multiply": 2 * sass.count(MULTIPLY_PIPE, sass.loop) * cycles / clock,
            "tensor": tensor * cycles / clock,
            "chain": chain / clock,
        }
        weights = recorded.options["BN"] * BKW * 16 / (32 * warps)
        facts["instructions_per_weight"] = sass.instructions_per_weight(weights)
        facts["registers"] = sass.registers
        facts["programs_per_sm"] = [on_busiest, resident]
    elif recorded.name == "route":
        # The gates stand between its two passes over K; each starts with nothing in flight.
        latencies = 2.0 * -(-on_busiest // max(1, resident))
        per_program = 2 * E * SCALE_BYTES * shape.K
        bounds["L2"] = on_busiest * per_program / l2_rate(gpu)
    elif recorded.name == "logits":  # a program reads its tokens' x and one expert's router
        per_program = (recorded.options["BT"] * ACTIVATION_BYTES + SCALE_BYTES) * shape.K
        bounds["L2"] = on_busiest * per_program / l2_rate(gpu)
    bound = max(bounds, key=lambda key: bounds[key])
    return {
        "kernel": recorded.name,
        "us": bounds[bound] + latencies * ASSUMED["dram_latency_us"],
        "bound": bound,
        "bounds_us": rounded(bounds),
        **rounded(facts),
    }


def dram_bytes(kernel: str, shape: Shape) -> float:
    """Bytes that a kernel moves; what one kernel leaves for the next is counted in both."""
    scaled = ACTIVATION_BYTES * shape.M * shape.K
    result = ACTIVATION_BYTES * shape.M * shape.N
    return {
        "route": 2 * scaled + 2 * E * SCALE_BYTES * shape.K,
        "logits": scaled + E * SCALE_BYTES * shape.K,
        "scale": 2 * scaled + E * SCALE_BYTES * shape.K,
        "gemm": shape.sign_bytes + scaled + result + SCALE_BYTES * E * shape.N,
        "dequant": shape.sign_bytes + 2.0 * shape.N * shape.K,
        "finish": 2.0 * result + SCALE_BYTES * E * shape.N,
    }[kernel]


def program_bytes(options: dict[str, Any], shape: Shape) -> float:
    """Bytes that one program of `gemm` reads through the L2 cache."""
    tokens = min(shape.M, options["BM"])
    return options["BN"] * shape.K / 8 + ACTIVATION_BYTES * tokens * shape.K


def l2_rate(gpu: Gpu) -> float:
    """Bytes in a microsecond from the L2 cache into one multiprocessor."""
    return ASSUMED["l2_bytes_per_cycle"] * gpu.ghz * 1e3


def mma_cycles(opcode: str, gpu: Gpu, BM: int) -> float:
    """Cycles that a tensor-core instruction of one warp occupies its scheduler's tensor core."""
    flops = MMA_FLOPS["HMMA"] if opcode.startswith("HMMA") else 2 * 64 * BM * 16 / 4
    return flops * gpu.sms * SCHEDULERS * gpu.ghz * 1e9 / (gpu.tflops * 1e12)


def independent_mmas(options: dict[str, Any]) -> int:
    """Chains of dependent MMAs in a warp: its tiles of 16 by 8, times the accumulators."""
    return options["BN"] // (16 * options["num_warps"]) * (options["BM"] // 8) * options["NACC"]


def rounded(values: dict[str, Any]) -> dict[str, Any]:
    """Three decimals are more than a model has."""
    return {k: round(v, 3) if isinstance(v, float) else v for k, v in values.items()}


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of the documentation."""
    lines = [
        "| GPU | K x N | M | fp16 roofline | fp16, model | paper fp16 | paper BinaryMoS | "
        "1-bit memory roof | gemm, model | bound by | layer, model |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|---|--:|",
    ]
    for row in rows:
        figures = [
            f"{row[key]:.1f}" if row[key] is not None else "-"
            for key in ("fp16_roofline_us", "fp16_us", "paper_fp16_us", "paper_binarymos_us")
        ]
        figures += [f"{row['memory_roof_us']:.2f}"]
        figures += [f"{row['gemm_us']:.2f}" if row["gemm_us"] else "-"]
        figures += [row["gemm_bound"] or "vendor GEMM", f"{row['layer_us']:.1f}"]
        place = f"| {row['gpu']} | {row['K']} x {row['N']} | {row['M']} | "
        lines.append(place + " | ".join(figures) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """M = 1 on the paper's GPU: what it measured, and what the model says of these kernels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    chosen = [row for row in rows if row["paper_fp16_us"] is not None]
    series = {
        "paper, fp16 (measured)": ("paper_fp16_us", "#999999"),
        "paper, BinaryMoS (measured)": ("paper_binarymos_us", "#1f77b4"),
        "fp16 roofline": ("fp16_roofline_us", "#cccccc"),
        "this layer (model)": ("layer_us", "#c1272d"),
        "this gemm kernel (model)": ("gemm_us", "#e8908f"),
        "1-bit memory roof": ("memory_roof_us", "#f2d0d0"),
    }
    figure, axis = pyplot.subplots(figsize=(9, 4), layout="constrained")
    for index, (label, (key, color)) in enumerate(series.items()):
        at = [place + 0.13 * (index - 2.5) for place in range(len(chosen))]
        axis.bar(at, [row[key] for row in chosen], 0.13, label=label, color=color)
    axis.set_xticks(range(len(chosen)), [f"{row['K']} x {row['N']}" for row in chosen])
    axis.set(ylabel="microseconds, M = 1", yscale="log", title="RTX A6000: a model, no measurement")
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize=7, ncols=3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    raise SystemExit(main())
