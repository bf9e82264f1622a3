"""A checkpoint in the layout of the authors' BinaryMoS code.

Per linear layer: `weight` [N,K], the latent weight whose sign is used, `gate_linear.weight` [E,K],
`in_channel_scale` [E,K], `out_channel_scale` [E,N] and possibly `bias` [N]; `num_expert` in
config.json. Scales and router are kept bit for bit. The reference takes sign(0) = 0, which one bit
cannot say: zeros become +1 and are counted.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.options import Options
from converters.sources.base import PackedLayer, Source, expect, pack_blocks
from converters.sources.store import Store
from converters.structure import decoder_linears
from vllm_bmos.checkpoint.format import (
    IN_SCALE,
    OUT_SCALE,
    ROUTER,
    SCALE_DTYPES,
    WEIGHT,
    FormatError,
)

LATENT = "weight"
GATE = "gate_linear.weight"
EXPERTS_KEY = "num_expert"
# The reference's own names happen to be the format's for the two scales.
SCALE_NAMES = {IN_SCALE: "in_channel_scale", OUT_SCALE: "out_channel_scale", ROUTER: GATE}


class OfficialSource(Source):
    """An official BinaryMoS checkpoint (Llama)."""

    kind = "official"
    suffixes = (LATENT, *SCALE_NAMES.values())

    def __init__(
        self, path: Path, options: Options, config: Mapping[str, Any], store: Store
    ) -> None:
        self.path = self.files = path
        self.store = store
        if options.ignore:
            raise FormatError(
                "--ignore: an official BinaryMoS checkpoint has no dense weights to keep; its "
                "`weight` tensors only carry signs. Drop the flag."
            )
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        self.experts = _experts(config)
        # The stale key would say again, and could contradict, what quantization_config says.
        self.config = {key: value for key, value in config.items() if key != EXPERTS_KEY}
        self.modules = decoder_linears(self.config, store.specs)
        # The authors' name for their class says nothing to vLLM.
        self.config["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config["model_type"]]]
        found = set()
        for module, (N, K) in self.modules.items():
            expect(f"{module}.{LATENT}", store.specs.get(f"{module}.{LATENT}"), (N, K))
            E = self.experts
            shapes = {IN_SCALE: (E, K), OUT_SCALE: (E, N), ROUTER: (E, K)}
            for suffix, shape in shapes.items():
                name = f"{module}.{SCALE_NAMES[suffix]}"
                found.add(expect(name, store.specs.get(name), shape).dtype)
        for name in store.specs:
            owner = _owner(name)
            if owner is not None and owner not in self.modules:
                raise FormatError(
                    f"{name}: {owner} is not a linear layer of a decoder block. The source is of "
                    "another layout than the official one."
                )
        own = found.pop() if len(found) == 1 else "F32"  # float32 holds a mixture exactly
        dtype = next(dtype for dtype, short in SCALE_DTYPES.items() if short == own)
        self.scale_dtype = options.scale_dtype or dtype

    @staticmethod
    def recognises(store: Store) -> bool:
        """Whether any tensor bears the name of an official router or scale."""
        return any(_owner(name) is not None for name in store.specs)

    def layer(self, module: str) -> PackedLayer:
        """Pack one layer's signs; read its scales and router."""
        name = f"{module}.{LATENT}"
        packed, zeros = pack_blocks(name, self.store.blocks(name))
        tensors = {WEIGHT: packed}
        for suffix, own in SCALE_NAMES.items():
            tensors[suffix] = self.store.tensor(f"{module}.{own}")
        return PackedLayer(tensors, zeros)


def _owner(name: str) -> str | None:
    for suffix in SCALE_NAMES.values():
        if name.endswith(f".{suffix}"):
            return name.removesuffix(f".{suffix}")
    return None


def _experts(config: Mapping[str, Any]) -> int:
    experts = config.get(EXPERTS_KEY)
    if type(experts) is not int or experts < 1:
        raise FormatError(
            f"config.json: {EXPERTS_KEY}: expected a positive integer, found {experts!r}. An "
            "official BinaryMoS checkpoint says how many experts it has."
        )
    return experts
