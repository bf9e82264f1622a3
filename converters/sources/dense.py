"""A dense Hugging Face directory: every linear layer of its decoder blocks is fitted."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.fitting import STAGES
from converters.moe import check_experts
from converters.options import Options
from converters.sources.base import PackedLayer, Source, expect, signs
from converters.sources.fused_experts import split_experts
from converters.sources.store import Store
from converters.structure import decoder_linears
from vllm_bmos.checkpoint.format import FormatError

DEFAULT_SCALE_DTYPE = "float16"


class DenseSource(Source):
    """Any causal language model that transformers knows."""

    kind = "dense"
    suffixes = ("weight",)

    def __init__(
        self, path: Path, options: Options, config: Mapping[str, Any], store: Store
    ) -> None:
        self.path, self.store = path, split_experts(store, config, options)
        self.files = path if path.is_dir() else path.parent
        self.config = dict(config)
        specs = self.store.specs
        linears = decoder_linears(config, specs)
        self.modules = {name: size for name, size in linears.items() if not options.ignores(name)}
        check_experts(self.modules, specs, options)
        if not self.modules:
            raise FormatError(
                f"{path}: no linear layer is left to pack: the model's decoder blocks have "
                f"{len(linears)}, and --ignore matches them all."
            )
        for name, size in self.modules.items():
            expect(f"{name}.weight", specs.get(f"{name}.weight"), size)
        self.experts = options.experts
        self.scale_dtype = options.scale_dtype or DEFAULT_SCALE_DTYPE
        self.stage = options.stage
        self._fit = STAGES[options.stage]

    def layer(self, module: str) -> PackedLayer:
        """Fit one layer by the chosen stage."""
        name = f"{module}.weight"
        weight = self.store.tensor(name)
        _, zeros = signs(name, weight)
        return PackedLayer(self._fit(weight, self.experts), zeros)
