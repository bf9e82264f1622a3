"""Makes a LLaMA-shaped packed BinaryMoS model with random signs and scales, in seconds.

    python benchmarks/make_model.py --shape llama-7b --out DIR

The model is as large and as fast as a real one and says nothing of sense: its activations stay
finite and of ordinary size, so that every kernel does its usual work. --layers makes it shorter.
"""

import argparse
import json
import math
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from harness import positive_int
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from vllm_bmos.checkpoint.format import (
    CONFIG_FILE,
    IN_SCALE,
    MANIFEST_FILE,
    OUT_SCALE,
    ROUTER,
    WEIGHT,
    BinaryMosConfig,
    TensorSpec,
    linear_specs,
)
from vllm_bmos.checkpoint.writer import CheckpointWriter

DEFAULT_WORK = Path.home() / ".cache" / "vllm-bmos" / "benchmarks"
MAX_SHARD_BYTES = 2 * 10**9
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
SCALE_DTYPE = "float16"


@dataclass(frozen=True)
class Shape:
    """The sizes of a LLaMA model, by their names in config.json."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int = 32000

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(N, K) of every linear layer of a decoder block, by its name in the block."""
        hidden, inner = self.hidden_size, self.intermediate_size
        kv = hidden // self.num_attention_heads * self.num_key_value_heads
        return {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }


SHAPES = {
    "llama-7b": Shape(4096, 11008, 32, 32, 32),
    "llama-13b": Shape(5120, 13824, 40, 40, 40),
    "llama-1b": Shape(2048, 5632, 22, 32, 4),
    "tiny": Shape(128, 352, 2, 4, 2, vocab_size=1024),
}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--shape", choices=SHAPES, default="llama-7b")
    parser.add_argument("--layers", type=int, help="decoder blocks; the shape's own by default")
    parser.add_argument("--E", type=int, default=4, help="scaling experts of every linear layer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    args = parser.parse_args()
    shape = with_layers(SHAPES[args.shape], args.layers)
    make_bmos_model(args.out, shape, args.E, args.seed)
    print(args.out)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of benchmarks that run a whole model: its shape, and where it is kept."""
    parser.add_argument("--shape", choices=SHAPES, default="llama-7b")
    parser.add_argument("--layers", type=positive_int, help="fewer decoder blocks, for a trial")
    parser.add_argument("--E", type=positive_int, default=4, help="experts of every linear layer")
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK, help="where models are kept")


def with_layers(shape: Shape, layers: int | None) -> Shape:
    """The shape with another number of decoder blocks, if one is given."""
    return shape if layers is None else replace(shape, num_hidden_layers=layers)


def kept_bmos_model(work: Path, name: str, shape: Shape, E: int) -> Path:
    """The packed checkpoint of a shape called `name` in a folder, made if it is not there."""
    directory = work / f"{name}-{shape.num_hidden_layers}-E{E}"
    if not (directory / MANIFEST_FILE).exists():  # the last file that is written
        make_bmos_model(directory, shape, E)
    return directory


def make_bmos_model(directory: Path, shape: Shape, E: int, seed: int = 0) -> None:
    """Write a packed checkpoint with config and tokenizer, replacing `directory`."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    blocks = [f"model.layers.{index}" for index in range(shape.num_hidden_layers)]
    linears = {f"{block}.{name}": size for block in blocks for name, size in shape.linears.items()}
    quantization = BinaryMosConfig(
        num_experts=E,
        modules=tuple(linears),
        scale_dtype=SCALE_DTYPE,
        provenance={"source": "benchmarks/make_model.py: random signs and scales", "seed": seed},
    )
    write_config(directory, shape, quantization.to_dict())
    write_tokenizer(directory, shape.vocab_size)
    dense = _dense_specs(shape, blocks)
    specs = dense | {
        f"{module}.{name}": spec
        for module, (N, K) in linears.items()
        for name, spec in linear_specs(N, K, E, SCALE_DTYPE).items()
    }
    generator = torch.Generator().manual_seed(seed)
    writer = CheckpointWriter(directory, specs, MAX_SHARD_BYTES)
    for name, spec in dense.items():
        writer.write(name, _dense_tensor(spec, generator))
    for module, (N, K) in linears.items():
        # Each of the 2 L residual additions gets an equal share of the variance.
        residual = module.endswith(("o_proj", "down_proj"))
        share = (2 * shape.num_hidden_layers) ** -0.5 if residual else 1.0
        for name, tensor in _linear_tensors(N, K, E, share, generator).items():
            writer.write(f"{module}.{name}", tensor)
    writer.finish()


def make_dense_model(directory: Path, shape: Shape, seed: int = 0) -> None:
    """Write a dense model of a small shape in one file, with tokenizer, replacing `directory`."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    write_config(directory, shape, None)
    write_tokenizer(directory, shape.vocab_size)
    blocks = [f"model.layers.{index}" for index in range(shape.num_hidden_layers)]
    specs = _dense_specs(shape, blocks) | {
        f"{block}.{name}.weight": TensorSpec("BF16", size)
        for block in blocks
        for name, size in shape.linears.items()
    }
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: _dense_tensor(spec, generator) for name, spec in specs.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def write_config(directory: Path, shape: Shape, quantization: dict[str, Any] | None) -> None:
    """Write config.json of a LLaMA model, dense if there is no quantization config."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **asdict(shape),
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": SPECIAL_TOKENS.index("<s>"),
        "eos_token_id": SPECIAL_TOKENS.index("</s>"),
    }
    if quantization is not None:
        config["quantization_config"] = quantization
    _write_json(directory / CONFIG_FILE, config)


def write_tokenizer(directory: Path, vocab_size: int) -> None:
    """Write a byte-level tokenizer, filled up with tokens that are spelled <x0>, <x1>, ...

    Any text can be encoded, any token decoded, and a text decoded from random tokens has as many
    tokens when it is encoded again, as `vllm bench` wants.

    Raises:
        ValueError: if the vocabulary has no room for the bytes.
    """
    tokens = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    if vocab_size < len(tokens):
        raise ValueError(f"vocab_size: expected at least {len(tokens)}, found {vocab_size}")
    tokens += [f"<x{index}>" for index in range(vocab_size - len(tokens))]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"<x\d+>"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(directory / "tokenizer.json"))
    unk, bos, eos = SPECIAL_TOKENS
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": unk,
        "bos_token": bos,
        "eos_token": eos,
        "model_max_length": 4096,
        "clean_up_tokenization_spaces": False,
    }
    _write_json(directory / "tokenizer_config.json", config)


def _dense_specs(shape: Shape, blocks: list[str]) -> dict[str, TensorSpec]:
    hidden = shape.hidden_size
    table, norm = TensorSpec("BF16", (shape.vocab_size, hidden)), TensorSpec("BF16", (hidden,))
    norms = [f"{block}.{name}" for block in blocks for name in _NORMS]
    return {
        "model.embed_tokens.weight": table,
        "lm_head.weight": table,
        **{name: norm for name in (*norms, "model.norm.weight")},
    }


_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")


def _dense_tensor(spec: TensorSpec, generator: torch.Generator) -> torch.Tensor:
    if len(spec.shape) == 1:
        return torch.ones(spec.shape, dtype=torch.bfloat16)
    # Rows of length 1, so that logits have variance 1 and every token a chance.
    values = torch.randn(spec.shape, generator=generator) * spec.shape[1] ** -0.5
    return values.to(torch.bfloat16)


def _linear_tensors(
    N: int, K: int, E: int, share: float, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Random signs, and scales with which the layer keeps the size of x times `share`."""

    def around(center: float, size: int) -> torch.Tensor:
        return center * (1 + 0.1 * torch.randn(E, size, generator=generator))

    width = math.ceil(K / 8)
    packed = torch.randint(0, 256, (N, width), dtype=torch.uint8, generator=generator)
    if K % 8:
        packed[:, -1] &= 2 ** (K % 8) - 1
    scales = {
        IN_SCALE: around(1.0, K),
        OUT_SCALE: around(share * K**-0.5, N),
        ROUTER: torch.randn(E, K, generator=generator) * K**-0.5,
    }
    dtype = getattr(torch, SCALE_DTYPE)
    return {WEIGHT: packed} | {name: scale.to(dtype) for name, scale in scales.items()}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
