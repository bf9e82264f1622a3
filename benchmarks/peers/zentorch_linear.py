"""AMD's zentorch, as vLLM uses it on Zen processors: prepacked bf16, and int8 weights."""

import importlib
from collections.abc import Callable

import torch
from typing_extensions import override

from peers.base import Loaded, LoadedLayers, Mode, Peer, Weights


class Zentorch(Peer):
    """`zentorch_linear_unary` (bf16) and `zentorch_dynamic_qlinear` (W8A8)."""

    name = "zentorch"

    @override
    def unavailable(self) -> str | None:
        try:
            importlib.import_module("zentorch")  # registers the ops
        except (ImportError, OSError, RuntimeError) as error:
            return f"zentorch does not import: {error}"
        return None

    @override
    def modes(self, weights: Weights) -> list[Mode]:
        if weights.dtype != torch.bfloat16:
            return []
        return [Mode("bfloat16", "bf16", 4e-3, 16), Mode("w8a8", "int8", 2e-2, 8)]

    @override
    def load(self, weights: Weights, mode: Mode, copies: int, E: int) -> Loaded:
        load_one = _load_bf16 if mode.name == "bfloat16" else _load_w8a8
        return LoadedLayers([load_one(weights) for _ in range(copies)])


def _load_bf16(weights: Weights) -> Callable[[torch.Tensor], torch.Tensor]:
    ops = torch.ops.zentorch
    packed = ops.zentorch_weight_prepack_for_linear(weights.dense)
    return lambda x: ops.zentorch_linear_unary(x, packed, None, is_weight_prepacked=True)


def _load_w8a8(weights: Weights) -> Callable[[torch.Tensor], torch.Tensor]:
    ops = torch.ops.zentorch
    int8 = (weights.signs(torch.int8) * 64).contiguous()
    scale = torch.full((weights.N,), weights.scale / 64, dtype=torch.bfloat16)
    return lambda x: ops.zentorch_dynamic_qlinear(x, int8, scale, None)
