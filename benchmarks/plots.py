"""Plots of the benchmarks' JSON results. Without matplotlib there is a warning and no plot."""

import importlib.util
import math
import types
from pathlib import Path
from typing import Any

from harness import logger

OURS = "vllm_bmos"
COLORS = {
    "vllm_bmos": "#c1272d",
    "vllm_bf16": "#222222",
    "vllm_w8a8": "#1f77b4",
    "vllm_w4a16": "#17a2b8",
    "torch": "#999999",
    "zentorch": "#ff8c00",
    "llama_cpp": "#2ca02c",
}
STYLES = ("-", "--", ":", "-.")
LABEL = {"textcoords": "offset points", "fontsize": 8}


def _pyplot() -> types.ModuleType | None:
    if importlib.util.find_spec("matplotlib") is None:
        logger.warning("no plot: matplotlib is not installed")
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    module: types.ModuleType = pyplot
    return module


def plot_linear(result: dict[str, Any], path: Path) -> None:
    """Speed over batch size for each shape, cold weights, with the roofline of 1-bit weights."""
    pyplot = _pyplot()
    if pyplot is None:
        return
    rows = [row for row in result["rows"] if row["weights"] == "cold"]
    shapes = list(dict.fromkeys((row["K"], row["N"]) for row in rows))
    if not shapes:
        logger.warning("no plot: no rows")
        return
    columns = min(3, len(shapes))
    lines = -(-len(shapes) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(5 * columns, 4.2 * lines), squeeze=False, layout="constrained"
    )
    limits = result["machine"]["limits"]
    for axis, (K, N) in zip(axes.flat, shapes, strict=False):
        here = [row for row in rows if (row["K"], row["N"]) == (K, N)]
        Ms = sorted({row["M"] for row in here})
        _draw_series(axis, here)
        # 1/8 byte a weight read once for 2 M operations a weight.
        roof = [min(limits["int8_gops"], 16 * M * limits["read_gbs"]) / 1e3 for M in Ms]
        axis.plot(Ms, roof, color="#bbbbbb", linewidth=6, alpha=0.5, zorder=0)
        axis.set(title=f"K={K}, N={N}", xscale="log", yscale="log", xticks=Ms)
        axis.set_xticklabels([str(M) for M in Ms])
        axis.minorticks_off()
        axis.grid(alpha=0.3, which="both")
    for axis in axes.flat[len(shapes) :]:
        axis.axis("off")
    for axis in axes[-1]:
        axis.set_xlabel("tokens M")
    for axis in axes[:, 0]:
        axis.set_ylabel("2 M N K / time, TOP/s")
    handles, names = axes.flat[0].get_legend_handles_labels()
    handles.append(pyplot.Line2D([], [], color="#bbbbbb", linewidth=6, alpha=0.5))
    names.append("limit of 1-bit weights (read rate, int8 product)")
    figure.legend(handles, names, loc="outside right upper", fontsize=8)
    machine = result["machine"]
    figure.suptitle(
        f"One linear layer, cold weights: {machine.get('gpu', machine['cpu'])}, "
        f"{machine['threads']} threads, commit {machine['commit']}",
        fontsize=10,
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    logger.info("wrote %s", path)


def _draw_series(axis: Any, rows: list[dict[str, Any]]) -> None:
    series: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for row in rows:
        series.setdefault((row["provider"], row["mode"], row["E"]), []).append(row)
    modes: dict[str, int] = {}
    for (provider, mode, E), points in series.items():
        index = modes[provider] = modes.get(provider, -1) + 1
        label = f"{provider} {mode}" + (f" E={E}" if E else "")
        points.sort(key=lambda row: row["M"])
        axis.plot(
            [row["M"] for row in points],
            [row["gflops"] / 1e3 for row in points],
            STYLES[index % len(STYLES)],
            color=COLORS.get(provider, "#8844aa"),
            linewidth=2.2 if provider == OURS else 1.3,
            marker="o",
            markersize=3,
            label=label,
        )


def plot_quality(result: dict[str, Any], path: Path) -> None:
    """Perplexity over stored bits per weight, one point a method; the dense model is a line."""
    pyplot = _pyplot()
    rows = [row for row in result["rows"] if row["perplexity"]]
    if pyplot is None or not rows:
        return
    texts = list(dict.fromkeys(text for row in rows for text in row["perplexity"]))
    figure, axes = pyplot.subplots(
        1, len(texts), figsize=(7.5 * len(texts), 5), squeeze=False, layout="constrained"
    )
    for axis, text in zip(axes[0], texts, strict=True):
        scored = [row for row in rows if text in row["perplexity"]]
        values = [row["perplexity"][text]["perplexity"] for row in scored]
        log = max(values) > 10 * min(values)
        on_axis, back = (math.log10, lambda y: 10**y) if log else (float, float)
        height = (on_axis(max(values)) - on_axis(min(values))) / 25  # of a label
        lowest: dict[int, float] = {}  # where the next label of so many bits may be
        for row in sorted(scored, key=lambda row: float(row["perplexity"][text]["perplexity"])):
            value = row["perplexity"][text]["perplexity"]
            if row["key"] == "float16":
                axis.axhline(value, color="#222222", linestyle="--", linewidth=1)
                axis.annotate(f"Float16: {value:.1f}", (1, value), (0, 4), **LABEL)
                continue
            color = COLORS["torch"] if row["stage"] is None else COLORS[OURS]
            axis.plot(row["bits"], value, "o", color=color, markersize=7)
            place = max(on_axis(value), lowest.get(int(row["bits"]), 0.0))
            lowest[int(row["bits"])] = place + height
            label = f"{row['name']}: {value:,.{0 if value >= 1000 else 1}f}"
            axis.text(row["bits"] + 0.06, back(place), label, fontsize=8, va="center")
        axis.set(
            yscale="log" if log else "linear",
            xlim=(0.9, 4.2),
            xlabel="stored bits per quantized weight",
        )
        axis.set_title(text, fontsize=10)
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("perplexity (lower is better)")
    fit = result["settings"]
    figure.suptitle(
        f"{result['model']}\nBinaryMoS (red) and baselines (grey), fitted on "
        f"{fit['windows']} windows of {fit['length']} tokens; stages that train saw more",
        fontsize=10,
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    logger.info("wrote %s", path)
