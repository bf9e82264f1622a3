"""Makes synthetic checkpoints in the layout of the authors' BinaryMoS code, of any Llama size.

    python benchmarks/make_official.py DST --size 7b
    python benchmarks/make_official.py DST --size tiny --bin --seed 1
    python benchmarks/make_official.py DST --size 7b --experts 0   # the same model, dense

The weights are random, so the model says nothing; sizes, names, dtypes and files are those of the
published checkpoints. Files are written by safetensors or torch.save, not by this project's writer.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

SIZES = {
    "tiny": {
        "hidden_size": 40,
        "intermediate_size": 76,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 96,
    },
    "small": {
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": 2000,
    },
    "7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
    "13b": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "vocab_size": 32000,
    },
}


def config(size: str, experts: int) -> dict[str, object]:
    """config.json as the published checkpoints have it: no quantization_config."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **SIZES[size],
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "torch_dtype": "float16",
        **({"num_expert": experts} if experts else {}),
    }


def linears(size: str) -> dict[str, tuple[int, int]]:
    """(N, K) of the linear layers of one block, by name behind the block's."""
    shape = SIZES[size]
    H, F = shape["hidden_size"], shape["intermediate_size"]
    KV = H // shape["num_attention_heads"] * shape["num_key_value_heads"]
    return {
        "self_attn.q_proj": (H, H),
        "self_attn.k_proj": (KV, H),
        "self_attn.v_proj": (KV, H),
        "self_attn.o_proj": (H, H),
        "mlp.gate_proj": (F, H),
        "mlp.up_proj": (F, H),
        "mlp.down_proj": (H, F),
    }


def tensors(size: str, experts: int, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the checkpoint, made when it is asked for."""
    random = torch.Generator().manual_seed(seed)
    shape = SIZES[size]
    H, V = shape["hidden_size"], shape["vocab_size"]

    def latent(*dims: int) -> torch.Tensor:
        """fp16 of both signs, 2^-6 to 2^-5, from random bits: far faster than a normal draw."""
        bits = torch.empty(dims, dtype=torch.int16)
        bits.view(-1).random_(-(1 << 15), 1 << 15, generator=random)
        return bits.bitwise_and_(-0x7C01).bitwise_or_(0x2400).view(torch.float16)

    def scale(*dims: int) -> torch.Tensor:
        return (0.05 + 0.1 * torch.rand(dims, generator=random)).half()

    yield "model.embed_tokens.weight", latent(V, H)
    for block in range(shape["num_hidden_layers"]):
        for name, (N, K) in linears(size).items():
            module = f"model.layers.{block}.{name}"
            yield f"{module}.weight", latent(N, K)
            if not experts:
                continue
            yield f"{module}.gate_linear.weight", torch.randn(experts, K, generator=random).half()
            yield f"{module}.in_channel_scale", scale(experts, K)
            yield f"{module}.out_channel_scale", scale(experts, N)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{block}.{norm}.weight", torch.ones(H).half()
    yield "model.norm.weight", torch.ones(H).half()
    yield "lm_head.weight", latent(V, H)


def make(
    target: Path,
    size: str = "tiny",
    *,
    experts: int = 4,
    seed: int = 0,
    shard_bytes: int = 1_000_000_000,
    as_bin: bool = False,
) -> Path:
    """Write a synthetic official checkpoint to a new directory and return its path."""
    target.mkdir(parents=True)
    shards: list[list[str]] = []
    waiting: dict[str, torch.Tensor] = {}

    def flush() -> None:
        part = target / f"part-{len(shards)}"
        torch.save(waiting, part) if as_bin else save_file(waiting, part, metadata={"format": "pt"})
        shards.append(list(waiting))
        waiting.clear()

    used = 0
    for name, tensor in tensors(size, experts, seed):
        if waiting and used + tensor.nbytes > shard_bytes:
            flush()
            used = 0
        waiting[name] = tensor
        used += tensor.nbytes
    flush()
    _name_shards(target, shards, "pytorch_model.bin" if as_bin else "model.safetensors")
    (target / "config.json").write_text(json.dumps(config(size, experts), indent=2))
    return target


def _name_shards(target: Path, shards: list[list[str]], single: str) -> None:
    """Give the parts their final names, and write the index if there are several."""
    if len(shards) == 1:
        (target / "part-0").rename(target / single)
        return
    stem, _, suffix = single.rpartition(".")
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"{stem}-{number + 1:05d}-of-{len(shards):05d}.{suffix}"
        (target / f"part-{number}").rename(target / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (target / f"{single}.index.json").write_text(json.dumps(index, indent=2))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("target", type=Path, help="directory to create")
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--experts", type=int, default=4, help="0 makes a dense model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-bytes", type=int, default=1_000_000_000)
    parser.add_argument("--bin", action="store_true", help="torch.save instead of safetensors")
    args = parser.parse_args()
    make(
        args.target,
        args.size,
        experts=args.experts,
        seed=args.seed,
        shard_bytes=args.shard_bytes,
        as_bin=args.bin,
    )
    size = sum(file.stat().st_size for file in args.target.iterdir())
    print(f"{args.target}: {size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
