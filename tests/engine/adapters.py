"""Random LoRA adapters on every projection, and what transformers answers with one of them."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vllm_bmos.checkpoint import Checkpoint

ALPHA = 16


def make_adapter(packed: Path, path: Path, rank: int = 8, seed: int = 0) -> Path:
    """An adapter in PEFT's layout whose delta is as large as the layer's own output."""
    generator = torch.Generator().manual_seed(seed)
    path.mkdir(parents=True)
    tensors = {}
    shapes = Checkpoint(packed).shapes
    for name, (N, K) in shapes.items():
        A = torch.randn(rank, K, generator=generator) / K**0.5
        B = torch.randn(N, rank, generator=generator) / rank**0.5
        tensors[f"base_model.model.{name}.lora_A.weight"] = A
        tensors[f"base_model.model.{name}.lora_B.weight"] = B
    save_file(tensors, path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": ALPHA,
        "target_modules": sorted({name.rpartition(".")[2] for name in shapes}),
        "bias": "none",
    }
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


@contextmanager
def adapted(model: nn.Module, path: Path) -> Iterator[None]:
    """Add alpha / rank * B @ A @ x to the output of each layer that the adapter names."""
    tensors = load_file(path / "adapter_model.safetensors")
    rank = json.loads((path / "adapter_config.json").read_text())["r"]
    handles = []
    for key, A in tensors.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_A\.weight", key)
        if match is None:
            continue
        B = tensors[key.replace("lora_A", "lora_B")]

        def add(
            module: nn.Module,
            inputs: tuple[Any, ...],
            output: torch.Tensor,
            delta: torch.Tensor = ALPHA / rank * B @ A,
        ) -> torch.Tensor:
            return output + inputs[0] @ delta.T.to(output.dtype)

        handles.append(model.get_submodule(match[1]).register_forward_hook(add))
    assert handles
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
