"""How a model uses its scaling experts on a text: gating scores, and scales that follow the token.

    python benchmarks/analyze_scales.py MODEL --text FILE --layer model.layers.15.self_attn.o_proj

The analysis of BinaryMoS (arXiv 2406.12311, figure 3) for every layer. Numbers go to the JSON file,
three figures beside it: `*_gates.svg`, the gating scores G of one layer over the tokens;
`*_spread.svg`, the scales G @ S_in and G @ S_out that its tokens see, channel by channel, against
the static ones; and `*_scales.svg`, how far the scales of every layer move with the token.
"""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from harness import common_parser, logger, machine_facts, positive_int, start, write_json

from converters.evaluate import gate_entropy

CHANNELS = 16  # in the figure of one layer, evenly taken from all


def follow(G: torch.Tensor, S: torch.Tensor) -> dict[str, float]:
    """How far the scales G[M,E] @ S[E,C] move with the token.

    Returns:
        Of each channel's deviation over the tokens from its mean, relative to that mean's size:
        the median over channels, the 90th percentile over channels, and the largest.
    """
    scales = G @ S  # [M, C]
    mean = scales.mean(dim=0)
    deviation = (scales - mean).square().mean(dim=0).sqrt() / mean.abs().clamp_min(1e-12)
    return {
        "median": float(deviation.median()),
        "p90": float(deviation.quantile(0.9)),
        "largest": float(deviation.max()),
    }


class Seen(NamedTuple):
    """A layer's gating scores G [M, E] and its experts' scales S_in [E, K] and S_out [E, N]."""

    G: torch.Tensor
    S_in: torch.Tensor
    S_out: torch.Tensor


def describe(G: torch.Tensor, S_in: torch.Tensor, S_out: torch.Tensor) -> dict[str, Any]:
    """The numbers of one layer from its gating scores G[M,E] and its experts' scales."""
    return {
        "entropy_bits": gate_entropy(G),
        "expert_share": [float(share) for share in G.mean(dim=0)],
        "top_share": [float((G.argmax(dim=-1) == e).float().mean()) for e in range(G.shape[1])],
        "in": follow(G, S_in),
        "out": follow(G, S_out),
    }


@torch.inference_mode()
def analyze(
    path: Path, text: str, count: int
) -> tuple[dict[str, dict[str, Any]], dict[str, Seen], list[str]]:
    """Run a packed model on the first tokens of a text.

    Returns:
        The numbers of every layer, what was seen of each, and the tokens as text.

    Raises:
        ValueError: if the model is not packed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from vllm_bmos.integrations.transformers import BinaryMosLinear

    tokenizer = AutoTokenizer.from_pretrained(path)
    tokens = tokenizer(text, add_special_tokens=False, verbose=False).input_ids[:count]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, BinaryMosLinear)}
    if not layers:
        raise ValueError(f"{path} has no packed layer. Convert it first.")
    seen: dict[str, Seen] = {}
    numbers: dict[str, dict[str, Any]] = {}

    def watch(name: str, layer: BinaryMosLinear, x: torch.Tensor) -> None:
        seen[name] = Seen(
            layer.gates(x), layer.in_channel_scale.float(), layer.out_channel_scale.float()
        )
        numbers[name] = describe(*seen[name])

    for name, layer in layers.items():
        layer.register_forward_pre_hook(
            lambda module, inputs, name=name: watch(name, module, inputs[0])
        )
    model(torch.tensor([tokens]))
    return numbers, seen, [tokenizer.decode([token]) for token in tokens]


def plot_gates(G: torch.Tensor, tokens: list[str], title: str, path: Path) -> None:
    """The gating score of every expert over the tokens of a text, stacked to 1."""
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(max(6, 0.16 * len(tokens)), 3.2), layout="constrained")
    bottom = torch.zeros(len(G))
    for e in range(G.shape[1]):
        axis.bar(range(len(G)), G[:, e], 1.0, bottom=bottom, label=f"expert {e}")
        bottom = bottom + G[:, e]
    if len(tokens) <= 128:
        # A dollar sign would begin a formula.
        names = [token.strip().replace("$", r"\$") or "·" for token in tokens]
        axis.set_xticks(range(len(G)), names, rotation=90, fontsize=6)
    axis.set(
        title=title, ylabel="gating score, stacked to 1", xlabel="tokens of the text, in order"
    )
    axis.set(ylim=(0, 1), xlim=(-0.5, len(G) - 0.5))
    figure.legend(loc="outside right upper")
    figure.savefig(path)
    pyplot.close(figure)


def plot_spread(seen: Seen, title: str, path: Path) -> None:
    """Boxes over the tokens of some channels' scales, with the scale that equal gates would give.

    A box holds half of the tokens, its whiskers reach the least and the largest scale.
    """
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 3.8), layout="constrained", squeeze=False)
    sides = (("input scales G @ S_in", seen.S_in), ("output scales G @ S_out", seen.S_out))
    for axis, (what, S) in zip(axes[0], sides, strict=True):
        chosen = torch.linspace(0, S.shape[1] - 1, min(CHANNELS, S.shape[1])).long()
        axis.boxplot((seen.G @ S[:, chosen]).numpy(), whis=(0, 100), widths=0.6)
        places = range(1, len(chosen) + 1)
        axis.plot(places, S[:, chosen].mean(dim=0), "_", color="#c1272d", markersize=14, mew=2)
        axis.set_xticks(places, [str(int(c)) for c in chosen], fontsize=7, rotation=90)
        axis.set(title=what, xlabel="channel")
        axis.grid(alpha=0.3, axis="y")
    axes[0, 0].set_ylabel("scale")
    static = pyplot.Line2D([], [], color="#c1272d", linewidth=2, label="static: equal gates")
    box = pyplot.Line2D([], [], color="#222222", linewidth=1, label="over the tokens")
    figure.legend(handles=[box, static], loc="outside right upper", fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path)
    pyplot.close(figure)


def plot_scales(numbers: dict[str, dict[str, Any]], title: str, path: Path) -> None:
    """Per kind of layer, over depth: how far the scales of the median channel move."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, 2, figsize=(11, 3.6), sharey=True, layout="constrained", squeeze=False
    )
    kinds: dict[str, list[dict[str, Any]]] = {}
    for name, row in numbers.items():
        kinds.setdefault(name.rpartition(".")[2], []).append(row)
    for axis, side, what in zip(
        axes[0], ("in", "out"), ("S_in: input scales", "S_out: output scales"), strict=True
    ):
        for kind, rows in kinds.items():
            values = [100 * row[side]["median"] for row in rows]
            axis.plot(range(len(rows)), values, marker="o", markersize=3, label=kind)
        axis.set(title=what, xlabel="block")
        axis.set_ylim(bottom=0)
        axis.xaxis.set_major_locator(pyplot.MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("standard deviation over the tokens,\n% of the mean; median channel")
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", fontsize=8)
    figure.suptitle(
        f"How far scales follow the token (0 = static, as OneBit)\n{title}", fontsize=10
    )
    figure.savefig(path)
    pyplot.close(figure)


def main() -> int:
    """Run the command line."""
    parser = common_parser((__doc__ or "").partition("\n")[0], "scales.json")
    parser.add_argument("model", type=Path, help="packed model directory")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text")
    parser.add_argument("--tokens", type=positive_int, default=64, help="of the text's start")
    parser.add_argument(
        "--layer", help="of the figures of one layer; without it the one in the middle"
    )
    args = parser.parse_args()
    start(args.threads)
    try:
        text = args.text.read_text(encoding="utf-8")
        numbers, seen, tokens = analyze(args.model, text, args.tokens)
        layer = args.layer or list(seen)[len(seen) // 2]
        if layer not in seen:
            raise ValueError(f"--layer {layer}: not a packed layer; one is {next(iter(seen))}.")
    except ValueError as error:
        logger.error("error: %s", error)
        return 2
    result = {
        "model": args.model.name,
        "text": args.text.name,
        "tokens": len(tokens),
        "layers": numbers,
        "machine": machine_facts(args.threads),
    }
    write_json(args.json, result)
    import matplotlib

    matplotlib.use("Agg")
    title = f"{args.model.name} on {len(tokens)} tokens of {args.text.name}"

    def beside(what: str) -> Path:
        return args.json.with_name(f"{args.json.stem}_{what}.svg")

    plot_gates(seen[layer].G, tokens, f"Experts that {layer} mixes\n{title}", beside("gates"))
    plot_spread(seen[layer], f"Scales of {layer}\n{title}", beside("spread"))
    plot_scales(numbers, title, beside("scales"))
    logger.info("wrote %s, %s and %s", *map(beside, ("gates", "spread", "scales")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
