"""Marlin with 4-bit weights, through vLLM's CUDA build: what most GPU users of vLLM run today."""

import importlib.util
from functools import partial

import torch
from typing_extensions import override

from peers.base import Loaded, LoadedLayers, Mode, Peer, Weights

GROUP = 128


class Marlin(Peer):
    """GPTQ-style 4-bit weights in groups of 128, 16-bit activations."""

    name = "marlin"
    devices = ("cuda",)

    @override
    def unavailable(self) -> str | None:
        if importlib.util.find_spec("vllm") is None:
            return "vllm is not installed"
        from vllm.platforms import current_platform

        return None if current_platform.is_cuda() else "this vllm is not built for CUDA"

    @override
    def modes(self, weights: Weights) -> list[Mode]:
        fits = weights.K % GROUP == 0 and weights.N % 64 == 0
        if weights.dtype == torch.float32 or not fits:
            return []
        return [Mode("w4a16", "bf16", 1e-2, 4 + 16 / GROUP)]

    @override
    def load(self, weights: Weights, mode: Mode, copies: int, E: int) -> Loaded:
        from vllm.model_executor.layers.quantization.utils import marlin_utils, marlin_utils_test
        from vllm.scalar_type import scalar_types

        kind = scalar_types.uint4b8
        _, packed, scales = marlin_utils_test.marlin_quantize(
            weights.dense.T.contiguous(), kind, GROUP
        )
        return LoadedLayers(
            [
                partial(
                    marlin_utils.apply_gptq_marlin_linear,
                    weight=packed.clone(),
                    weight_scale=scales.clone(),
                    weight_zp=marlin_utils.marlin_make_empty(packed.device),
                    workspace=marlin_utils.marlin_make_workspace_new(packed.device),
                    wtype=kind,
                    output_size_per_partition=weights.N,
                    input_size_per_partition=weights.K,
                )
                for _ in range(copies)
            ]
        )
