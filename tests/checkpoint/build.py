"""A tiny packed checkpoint, written with the writer alone."""

from pathlib import Path

import torch

from vllm_bmos.checkpoint.format import (
    BIAS,
    CONFIG_FILE,
    IN_SCALE,
    OUT_SCALE,
    ROUTER,
    SAFETENSORS_DTYPES,
    WEIGHT,
    BinaryMosConfig,
    TensorSpec,
)
from vllm_bmos.checkpoint.signs import pack_signs
from vllm_bmos.checkpoint.writer import CheckpointWriter, write_json

# K = 11 leaves five padding bits in a row, K = 8 none.
LAYERS = {"model.layers.0.mlp.up_proj": (5, 11), "model.layers.0.mlp.down_proj": (8, 8)}
E = 2


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """Every tensor of the checkpoint."""
    torch.manual_seed(seed)
    result = {
        "model.embed_tokens.weight": torch.randn(7, 3, dtype=torch.bfloat16),
        "model.norm.weight": torch.ones(3),
    }
    for module, (N, K) in LAYERS.items():
        result[f"{module}.{WEIGHT}"] = pack_signs(torch.rand(N, K) < 0.5)
        result[f"{module}.{IN_SCALE}"] = torch.rand(E, K).half()
        result[f"{module}.{OUT_SCALE}"] = torch.rand(E, N).half()
        result[f"{module}.{ROUTER}"] = torch.randn(E, K).half()
    result[f"model.layers.0.mlp.up_proj.{BIAS}"] = torch.randn(5, dtype=torch.bfloat16)
    return result


def specs(values: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    """Their dtypes and shapes."""
    return {
        name: TensorSpec(SAFETENSORS_DTYPES[value.dtype], tuple(value.shape))
        for name, value in values.items()
    }


def build(
    path: Path,
    values: dict[str, torch.Tensor] | None = None,
    max_shard_size: int = 10_000_000,
    **config: object,
) -> Path:
    """Write it to a new directory."""
    values = tensors() if values is None else values
    path.mkdir()
    writer = CheckpointWriter(path, specs(values), max_shard_size)
    for name, value in values.items():
        writer.write(name, value)
    writer.finish()
    quantization = BinaryMosConfig(num_experts=E, modules=tuple(LAYERS)).to_dict() | config
    write_json(path / CONFIG_FILE, {"model_type": "llama", "quantization_config": quantization})
    return path
