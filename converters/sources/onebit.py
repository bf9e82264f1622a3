"""A checkpoint in the layouts of the OneBit authors' code (arXiv 2402.11295): E = 1.

Per linear layer `input_factor` [K], `weight_scale` [N] and

- for training: `weight` [N,K], the latent weight whose sign is used (zeros become +1, as in the
  authors' own packing);
- for inference: `weight` int8 [N, K/8], least significant bit first, 1 = -1: the complement of
  this format's bits.

The authors' layer ends in a LayerNorm without parameters, before the bias: the result says so in
`quantization_config.output_norm`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from converters.options import Options
from converters.sources.base import PackedLayer, Source, expect, pack_blocks
from converters.sources.store import Store
from converters.structure import decoder_linears
from vllm_bmos.checkpoint.format import (
    IN_SCALE,
    LAYER_NORM,
    OUT_SCALE,
    ROUTER,
    SCALE_DTYPES,
    WEIGHT,
    FormatError,
    TensorSpec,
)

STORED = "weight"
SCALE_NAMES = {IN_SCALE: "input_factor", OUT_SCALE: "weight_scale"}


class OneBitSource(Source):
    """A OneBit checkpoint (Llama), for training or for inference."""

    kind = "onebit"
    suffixes = (STORED, *SCALE_NAMES.values())
    output_norm = LAYER_NORM

    def __init__(
        self, path: Path, options: Options, config: Mapping[str, Any], store: Store
    ) -> None:
        self.path = self.files = path
        self.store = store
        if options.ignore:
            raise FormatError(
                "--ignore: a OneBit checkpoint has no dense weights to keep. Drop the flag."
            )
        self.config = {**config, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        self.experts = 1
        self.modules = decoder_linears(self.config, _as_if_dense(store.specs))
        found = set()
        for module, (N, K) in self.modules.items():
            if store.specs[f"{module}.{STORED}"].dtype != "I8":
                expect(f"{module}.{STORED}", store.specs[f"{module}.{STORED}"], (N, K))
            for suffix, size in ((IN_SCALE, K), (OUT_SCALE, N)):
                name = f"{module}.{SCALE_NAMES[suffix]}"
                found.add(expect(name, store.specs.get(name), (size,)).dtype)
        own = found.pop() if len(found) == 1 else "F32"
        dtype = next(dtype for dtype, short in SCALE_DTYPES.items() if short == own)
        self.scale_dtype = options.scale_dtype or dtype

    @staticmethod
    def recognises(store: Store) -> bool:
        """Whether any tensor bears the name of a OneBit scale."""
        return any(name.endswith(".input_factor") for name in store.specs)

    def layer(self, module: str) -> PackedLayer:
        """Pack or re-pack one layer's signs; read its scales."""
        name = f"{module}.{STORED}"
        if self.store.specs[name].dtype == "I8":
            packed, zeros = ~self.store.tensor(name).view(torch.uint8), 0
        else:
            packed, zeros = pack_blocks(name, self.store.blocks(name))
        tensors = {WEIGHT: packed}
        for suffix, own in SCALE_NAMES.items():
            tensors[suffix] = self.store.tensor(f"{module}.{own}").unsqueeze(0)
        tensors[ROUTER] = torch.zeros_like(tensors[IN_SCALE])
        return PackedLayer(tensors, zeros)


def _as_if_dense(specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """The shapes that the weights have once their bits are unpacked."""
    return {
        name: TensorSpec("F16", (spec.shape[0], 8 * spec.shape[1]))
        if spec.dtype == "I8" and name.endswith(f".{STORED}") and len(spec.shape) == 2
        else spec
        for name, spec in specs.items()
    }
