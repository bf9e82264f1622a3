"""How a model uses its scaling experts on a text: gating scores, and scales that follow the token.

    python benchmarks/analyze_scales.py MODEL --text FILE --layer model.layers.15.self_attn.o_proj

The analysis of BinaryMoS (arXiv 2406.12311, figure 3) for every layer. Numbers go to the JSON file;
two figures are written beside it: `*_gates.svg`, the gating scores G of one layer over the tokens,
and `*_scales.svg`, how far the scales G @ S_in and G @ S_out of each layer move with the token.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from harness import common_parser, logger, machine_facts, positive_int, start, write_json


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


def describe(G: torch.Tensor, S_in: torch.Tensor, S_out: torch.Tensor) -> dict[str, Any]:
    """The numbers of one layer from its gating scores G[M,E] and its experts' scales."""
    entropy = -(G * G.clamp_min(1e-30).log2()).sum(dim=-1)
    return {
        "entropy_bits": float(entropy.mean()),
        "expert_share": [float(share) for share in G.mean(dim=0)],
        "top_share": [float((G.argmax(dim=-1) == e).float().mean()) for e in range(G.shape[1])],
        "in": follow(G, S_in),
        "out": follow(G, S_out),
    }


@torch.inference_mode()
def analyze(
    path: Path, text: str, count: int
) -> tuple[dict[str, dict[str, Any]], dict[str, torch.Tensor], list[str]]:
    """Run a packed model on the first tokens of a text.

    Returns:
        The numbers of every layer, every layer's G [M, E], and the tokens as text.

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
    gates: dict[str, torch.Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}

    def watch(name: str, layer: BinaryMosLinear, x: torch.Tensor) -> None:
        x = x.reshape(-1, layer.in_features).float()
        gates[name] = (x @ layer.router_weight.float().T).softmax(dim=-1)
        S_in, S_out = layer.in_channel_scale.float(), layer.out_channel_scale.float()
        numbers[name] = describe(gates[name], S_in, S_out)

    for name, layer in layers.items():
        layer.register_forward_pre_hook(
            lambda module, inputs, name=name: watch(name, module, inputs[0])
        )
    model(torch.tensor([tokens]))
    return numbers, gates, [tokenizer.decode([token]) for token in tokens]


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
    axis.set(title=title, ylabel="gating score", ylim=(0, 1), xlim=(-0.5, len(G) - 0.5))
    figure.legend(loc="outside right upper")
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
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("deviation over the tokens,\n% of the channel's mean scale")
    axes[0, 1].legend(fontsize=8)
    figure.suptitle(f"{title}: how far scales follow the token (0 = static, as OneBit)")
    figure.savefig(path)
    pyplot.close(figure)


def main() -> int:
    """Run the command line."""
    parser = common_parser((__doc__ or "").partition("\n")[0], "scales.json")
    parser.add_argument("model", type=Path, help="packed model directory")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text")
    parser.add_argument("--tokens", type=positive_int, default=64, help="of the text's start")
    parser.add_argument("--layer", help="of the gate figure; without it the one in the middle")
    args = parser.parse_args()
    start(args.threads)
    try:
        text = args.text.read_text(encoding="utf-8")
        numbers, gates, tokens = analyze(args.model, text, args.tokens)
        layer = args.layer or list(gates)[len(gates) // 2]
        if layer not in gates:
            raise ValueError(f"--layer {layer}: not a packed layer; one is {next(iter(gates))}.")
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
    gate_file = args.json.with_name(f"{args.json.stem}_gates.svg")
    plot_gates(gates[layer], tokens, f"{layer}\n{title}", gate_file)
    scale_file = args.json.with_name(f"{args.json.stem}_scales.svg")
    plot_scales(numbers, title, scale_file)
    logger.info("wrote %s and %s", gate_file, scale_file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
