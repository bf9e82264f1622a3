"""Plots of the benchmarks' JSON results. Without matplotlib there is a warning and no plot."""

import importlib.util
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


def plot_linear(result: dict[str, Any], path: Path) -> None:
    """Speed over batch size for each shape, cold weights, with the roofline of 1-bit weights."""
    if importlib.util.find_spec("matplotlib") is None:
        logger.warning("no plot: matplotlib is not installed")
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

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
