"""What should the GPU kernels cost? A model, not a measurement: no GPU is involved.

    python benchmarks/gpu_model.py --json FILE

The real launcher's launches are compiled for each GPU, and their machine code is counted;
gpu_limits.py says what bounds one. Beside them stand float16's roofline and the times that the
paper measured on an RTX A6000. A table and a plot of M = 1 are written beside the JSON.

    python benchmarks/gpu_model.py --measured gpu_parts.json --json FILE

sets what benchmarks/gpu_parts.py measured beside the model of that GPU, kernel by kernel.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from gpu_limits import (
    ASSUMED,
    DRIVER_NAMES,
    GPUS,
    E,
    Gpu,
    Shape,
    flops_us,
    memory_roof_us,
    part_of,
    predict,
    rounded,
    vendor_gemm_us,
)
from harness import common_parser, logger, machine_facts, positive_int, start, write_json

from vllm_bmos.kernels.triton import aot

DTYPE = "float16"
DEFAULT_M = [1, 16, 256, 2048]

# Microseconds of one linear layer at M = 1, measured by the paper on an RTX A6000 (table 6).
PAPER = {
    (4096, 4096): {"fp16": 68.2, "binarymos": 34.5},
    (4096, 11008): {"fp16": 151.7, "binarymos": 36.9},
    (11008, 4096): {"fp16": 143.5, "binarymos": 37.0},
    (5120, 5120): {"fp16": 95.6, "binarymos": 35.6},
    (5120, 13824): {"fp16": 224.1, "binarymos": 43.4},
    (13824, 5120): {"fp16": 213.6, "binarymos": 44.5},
}


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


def measured(name: str, shape: Shape) -> bool:
    """Whether the paper timed this."""
    return name == "RTX A6000" and shape.M == 1


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
