"""Model sizes: the paper's Table 1 (arXiv 2406.12311) from the shapes, and further models.

    python benchmarks/memory.py --json FILE
    python benchmarks/memory.py --checkpoint DIR      # also a directory the converter wrote

Counted for every method: the linear layers of the decoder blocks as the method stores them, and
embeddings, output head and norms in float16. GB are 10^9 bytes. Per linear layer of N x K, E = 4:

    float16     16 bits a weight
    PB-LLM      10 % of the weights in 8 bits, 90 % in 1 bit, 1 bit to tell which     = 2.7 bits
    BiLLM       10 % salient in 2 bits, 90 % in 1 bit, a bitmap of 1 + 1/128 bits     = 2.108 bits
    OneBit      1 bit a weight; K + N scales in float16
    BinaryMoS   1 bit a weight; E (2K + N) scales and router weights in float16

The first three leave their own scales out, as the papers' bit counts do. `packed` is BinaryMoS as
this project writes it: whole bytes a row, file header, manifest; every file but the tokenizer.
"""

import argparse
import os
from pathlib import Path
from typing import Any

from harness import RESULTS, print_facts, start, write_json

from vllm_bmos.checkpoint.container import encode_header, spec_bytes
from vllm_bmos.checkpoint.format import TensorSpec, linear_specs
from vllm_bmos.checkpoint.reader import Checkpoint

E = 4
GB = 1e9
# hidden, ffn, blocks, heads, kv heads, head size, vocabulary; the head is not tied to embeddings.
MODELS = {
    "LLaMA-1/2-7B": (4096, 11008, 32, 32, 32, 128, 32000),
    "LLaMA-1/2-13B": (5120, 13824, 40, 40, 40, 128, 32000),
    "LLaMA-1-30B": (6656, 17920, 60, 52, 52, 128, 32000),
    "Llama-2-70B": (8192, 28672, 80, 64, 8, 128, 32000),
    "Qwen3-8B": (4096, 12288, 36, 32, 8, 128, 151936),
    "Qwen3-32B": (5120, 25600, 64, 64, 8, 128, 151936),
}
PAPER_GB = {
    "LLaMA-1/2-7B": {
        "float16": 13.51,
        "PB-LLM": 2.78,
        "BiLLM": 2.28,
        "OneBit": 1.37,
        "BinaryMoS": 1.40,
    },
    "LLaMA-1/2-13B": {
        "float16": 26.20,
        "PB-LLM": 5.02,
        "BiLLM": 4.06,
        "OneBit": 2.29,
        "BinaryMoS": 2.33,
    },
}
BITS_PER_WEIGHT = {
    "float16": 16.0,
    "PB-LLM": 0.1 * 8 + 0.9 * 1 + 1,
    "BiLLM": 0.1 * 2 + 0.9 * 1 + 1 + 1 / 128,
}
# JSON of one tensor in the manifest, and of one module in config.json, beside their names.
MANIFEST_ENTRY, CONFIG_ENTRY = 150, 12


def linears(model: str) -> dict[str, tuple[int, int]]:
    """(N, K) of the linear layers of one block."""
    H, F, _, heads, kv_heads, head, _ = MODELS[model]
    return {
        "self_attn.q_proj": (heads * head, H),
        "self_attn.k_proj": (kv_heads * head, H),
        "self_attn.v_proj": (kv_heads * head, H),
        "self_attn.o_proj": (H, heads * head),
        "mlp.gate_proj": (F, H),
        "mlp.up_proj": (F, H),
        "mlp.down_proj": (H, F),
    }


def dense_specs(model: str) -> dict[str, TensorSpec]:
    """The tensors that stay float16: embeddings, output head and norms."""
    H, _, blocks, _, _, _, vocabulary = MODELS[model]
    specs = {
        "model.embed_tokens.weight": TensorSpec("F16", (vocabulary, H)),
        "lm_head.weight": TensorSpec("F16", (vocabulary, H)),
        "model.norm.weight": TensorSpec("F16", (H,)),
    }
    for block in range(blocks):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            specs[f"model.layers.{block}.{norm}.weight"] = TensorSpec("F16", (H,))
    return specs


def formula_bytes(model: str) -> dict[str, float]:
    """Bytes of the whole model by method, from the formulas above."""
    blocks = MODELS[model][2]
    shapes = linears(model).values()
    weights = blocks * sum(N * K for N, K in shapes)
    dense = sum(map(spec_bytes, dense_specs(model).values()))
    sizes = {method: dense + weights * bits / 8 for method, bits in BITS_PER_WEIGHT.items()}
    sizes["OneBit"] = dense + weights / 8 + blocks * sum(2 * (K + N) for N, K in shapes)
    sizes["BinaryMoS"] = dense + weights / 8 + blocks * sum(2 * E * (2 * K + N) for N, K in shapes)
    return sizes


def packed_bytes(model: str) -> int:
    """Bytes of the directory that the converter writes, without tokenizer files."""
    specs, modules = dense_specs(model), []
    for block in range(MODELS[model][2]):
        for name, (N, K) in linears(model).items():
            modules.append(f"model.layers.{block}.{name}")
            for suffix, spec in linear_specs(N, K, E, "float16").items():
                specs[f"{modules[-1]}.{suffix}"] = spec
    header, _ = encode_header(specs)
    manifest = sum(len(name) + MANIFEST_ENTRY for name in specs)
    config = sum(len(name) + CONFIG_ENTRY for name in modules)
    return len(header) + sum(map(spec_bytes, specs.values())) + manifest + config


def measured(path: Path) -> dict[str, Any]:
    """What a packed directory weighs: all files, its tensors, and its packed layers alone."""
    checkpoint = Checkpoint(path)
    modules = tuple(f"{module}." for module in checkpoint.config.modules)
    tensors = {name: spec_bytes(spec) for name, spec in checkpoint.specs.items()}
    packed = sum(size for name, size in tensors.items() if name.startswith(modules))
    return {
        "name": path.name,
        "directory_bytes": sum(file.stat().st_size for file in path.iterdir()),
        "tensor_bytes": sum(tensors.values()),
        "packed_layer_bytes": packed,
        "weights": sum(N * K for N, K in checkpoint.shapes.values()),
    }


def held_by_vllm(path: Path) -> int:
    """Bytes that the quantized layers of a checkpoint take in vLLM, loaded in this process."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM

    from vllm_bmos.plugin.memory import quantized_bytes

    llm = LLM(str(path), skip_tokenizer_init=True, enforce_eager=True, max_model_len=128)
    return int(llm.apply_model(quantized_bytes)[0])


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: GB by method, the paper's figure in brackets."""
    methods = [*BITS_PER_WEIGHT, "OneBit", "BinaryMoS"]
    lines = ["| GB | " + " | ".join(methods) + " | packed |", "| --- |" + " --- |" * 6]
    for row in rows:
        cells = []
        for method in methods:
            paper = row["paper_gb"].get(method)
            cells.append(f"{row['gb'][method]:.2f}" + (f" ({paper:.2f})" if paper else ""))
        lines.append(f"| {row['model']} | " + " | ".join(cells) + f" | {row['packed_gb']:.3f} |")
    return "\n".join(lines)


def measured_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: what was written, and what vLLM holds of it where that was asked for."""
    lines = [
        "| GB | directory | its tensors | its packed layers | vLLM holds for these | bits/weight |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        held = row.get("held_by_vllm_bytes")
        sizes = [row[f"{part}_bytes"] for part in ("directory", "tensor", "packed_layer")]
        cells = [f"{size / GB:.3f}" for size in sizes]
        cells += [f"{held / GB:.3f}" if held else "-"]
        cells += [f"{8 * row['packed_layer_bytes'] / row['weights']:.3f}"]
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, default=RESULTS / "memory.json", metavar="FILE")
    parser.add_argument("--checkpoint", type=Path, action="append", default=[], metavar="DIR")
    parser.add_argument("--serve", action="store_true", help="load each DIR in vLLM as well")
    args = parser.parse_args()
    start(threads=1)
    rows = []
    for model in MODELS:
        rows.append(
            {
                "model": model,
                "gb": {method: size / GB for method, size in formula_bytes(model).items()},
                "packed_gb": packed_bytes(model) / GB,
                "paper_gb": PAPER_GB.get(model, {}),
            }
        )
    result: dict[str, Any] = {"rows": rows, "measured": [measured(p) for p in args.checkpoint]}
    if args.serve:
        for row, path in zip(result["measured"], args.checkpoint, strict=True):
            row["held_by_vllm_bytes"] = held_by_vllm(path)
    print_facts({"experts": E})
    print(table(rows))
    if args.checkpoint:
        print(measured_table(result["measured"]))
    write_json(args.json, result)


if __name__ == "__main__":
    main()
