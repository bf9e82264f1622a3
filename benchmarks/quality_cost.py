"""What a comparison would cost on a larger model, from the rows measured on a small one.

A method's operations on a model are counted roughly, by its leading terms, per linear layer of
N x K and for T calibration tokens:

    a pass of the model over the text        2 N K T
    a second moment X^T X                    2 K^2 T
    a solver under H                         sweeps * 2 N K^2, and the factors of H: K^3
    a training step                          4 passes (forward, backward twice, the teacher)

and the measured processor seconds are scaled by the ratio of both models' operations. Large
matrices run faster than small ones, so this rather overestimates.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memory import MODELS, linears

from converters.options import Options
from converters.plan import make_plan

Shapes = Sequence[tuple[int, int]]  # (N, K) of all quantized layers

# By stage or baseline: passes over the calibration text, second moments, sweeps of solvers.
LAYERWISE = {
    "gptq": (3.0, 1, 1),
    "pb-llm": (3.0, 1, 1),
    "billm": (3.0, 1, 1),
    "svid": (0.0, 0, 0),
    "hessian": (6.0, 2, 16),
}
STEP = 4  # passes in a training step


def shapes_of(model: str) -> list[tuple[int, int]]:
    """(N, K) of the quantized layers of a model by its name in memory.py, or of a directory.

    Raises:
        ValueError: if it is neither.
    """
    if model in MODELS:
        return list(linears(model).values()) * MODELS[model][2]
    if not Path(model).exists():
        raise ValueError(f"--predict-cost {model}: expected a path or one of {', '.join(MODELS)}.")
    return list(make_plan(Path(model), Options()).source.modules.values())


def operations(row: dict[str, Any], shapes: Shapes, settings: dict[str, Any]) -> float:
    """Operations of one method on a model of these layers."""
    tokens = settings["windows"] * settings["length"]
    weights = sum(N * K for N, K in shapes)
    kind = row["stage"] or row["key"]
    if kind == "float16":
        return float(weights)
    if kind == "omniquant":
        trained = settings["steps"] * settings["batch"] * settings["length"]
        return 2.0 * weights * ((STEP - 1) * trained + tokens)
    trained = row["trained_tokens"]
    passes, moments, sweeps = LAYERWISE.get(kind, LAYERWISE["hessian"])
    return (
        2.0 * weights * (passes * tokens + STEP * trained)
        + 2.0 * tokens * moments * sum(K * K for _, K in shapes)
        + sweeps * sum(2.0 * N * K * K + K**3 for N, K in shapes)
        + weights
    )


def cost_table(result: dict[str, Any], model: str) -> str:
    """Markdown: measured processor seconds of each method, and the hours predicted for `model`."""
    settings, larger, threads = result["settings"], shapes_of(model), result["machine"]["threads"]
    lines = [
        f"Predicted for {model} on {result['machine']['cpu']}, {threads} threads, from "
        f"{result['model']}:",
        "",
        f"| method | processor seconds, {result['model']} | processor hours | hours |",
        "| --- | ---: | ---: | ---: |",
    ]
    small = [(N, K) for N, K, count in result["shapes"] for _ in range(count)]
    for row in result["rows"]:
        if row["effort"] is None or not row["effort"]["whole"]:
            continue  # made elsewhere, or resumed: its time is not known
        used = row["effort"]["cpu_seconds"]
        hours = used * operations(row, larger, settings) / operations(row, small, settings) / 3600
        lines.append(f"| {row['name']} | {used:.0f} | {hours:.1f} | {hours / threads:.1f} |")
    return "\n".join(lines)
