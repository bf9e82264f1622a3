"""The quantization config that vLLM builds from a checkpoint, and which layers it claims."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import VllmConfig, get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.platforms import current_platform

from vllm_bmos.checkpoint import QUANT_METHOD, BinaryMosConfig, Checkpoint, FormatError
from vllm_bmos.checkpoint.format import BIAS, INDEX_FILE, MANIFEST_FILE, SINGLE_FILE
from vllm_bmos.checkpoint.reader import read_weight_map
from vllm_bmos.plugin.embedding import LeanEmbeddingMethod
from vllm_bmos.plugin.int8_embedding import EMBEDDINGS_ENV, Int8EmbeddingMethod, int8_wanted
from vllm_bmos.plugin.linear import BinaryMosLinearMethod
from vllm_bmos.plugin.memory import available_bytes, check_memory
from vllm_bmos.plugin.moe import BinaryMosMoEMethod
from vllm_bmos.plugin.transformed import refuse_transformed

if TYPE_CHECKING:
    from vllm.model_executor.models.utils import WeightsMapper

logger = init_logger(__name__)

# Formats that read the checkpoint's own safetensors files. The others (dummy, sharded_state)
# have no such files, so there is nothing to validate.
CHECKPOINT_LOAD_FORMATS = {
    "auto",
    "hf",
    "safetensors",
    "fastsafetensors",
    "instanttensor",
    "runai_streamer",
}


# vLLM builds the draft model of a speculative pair under this prefix.
DRAFT_PREFIX = "draft_model."
# StableLM and GPT-J do not announce the first, Qwen3-MoE the second only when it is being built.
USUAL_MERGES = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
}
# What checkpoints of base models (of embeddings, say) lack; vLLM adds it as it loads them.
BASE_PREFIX = "model."
# What Granite 4, Falcon H1 and Zamba 2 keep as the latter, vLLM builds as the former.
MIXER, MAMBA = ".mixer.", ".mamba."


def reads_checkpoint(vllm_config: VllmConfig) -> bool:
    """Whether the model's weights come from the checkpoint's own files."""
    return vllm_config.load_config.load_format in CHECKPOINT_LOAD_FORMATS


class BinaryMosVllmConfig(QuantizationConfig):
    """`quantization_config` of a packed checkpoint, as vLLM's model builder asks for it.

    Attributes:
        config: the checkpoint's quantization config.
        modules: checkpoint name of every quantized layer by the name vLLM's model gives it.
        biases: whether each quantized layer has a bias, by checkpoint name; None if the
            checkpoint's files were not read (load formats that do not use them).
        nbytes: bytes of all tensors of those files.
    """

    def __init__(self, config: BinaryMosConfig | None = None) -> None:
        super().__init__()
        if config is None:  # vLLM's way for methods that need nothing from the model
            raise FormatError(
                f"--quantization {QUANT_METHOD}: config.json has no quantization_config, so this "
                "is not a packed checkpoint. Convert the model with hf-to-bmos and serve the "
                "result, or leave the option out."
            )
        self.config = config
        self.modules = {name: name for name in config.modules}
        self.biases: dict[str, bool] | None = None
        self.nbytes = 0
        self._claimed: set[str] = set()
        self._in_8_bits = False

    @classmethod
    def get_name(cls) -> Any:
        """The name in config.json and of `--quantization`."""
        return QUANT_METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Every dtype vLLM serves in; what a kernel rounds to it is the kernel's to say."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Volta; what each generation gets is the kernels' `can_run` to say."""
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: the config is part of config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "BinaryMosVllmConfig":
        """Build from config.json's `quantization_config`; raises FormatError if it is invalid."""
        return cls(BinaryMosConfig.from_dict(config))

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Validate the checkpoint's headers as early as vLLM lets us.

        vLLM's own checks do not see a missing shard of a merged layer, a missing norm or an extra
        bias of a quantized model, so the whole inventory is checked here, in the front process,
        where the error is the last thing a user reads.
        """
        path = Path(model_name)
        # A sharded state has files of its own, and of a model in an object store vLLM puts the
        # JSON files alone into a directory.
        files = {SINGLE_FILE}
        if (path / INDEX_FILE).exists():
            files |= set(read_weight_map(path / INDEX_FILE, ".safetensors").values())
        if any((path / file).exists() for file in files):
            self._read_checkpoint(path)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: "WeightsMapper") -> None:
        """Follow vLLM's renaming of a model's modules."""
        renamed: dict[str, str] = {}
        for vllm_name, name in self.modules.items():
            # apply_list drops a name that the model ignores; such a layer is never built.
            for new_name in hf_to_vllm_mapper.apply_list([vllm_name]):
                renamed[new_name] = name
        self.modules = renamed

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method for one layer of the model.

        Raises:
            ValueError: if a layer is quantized in the checkpoint and cannot be served.
        """
        prefix = self._name_in_modules(prefix)
        if isinstance(layer, RoutedExperts):
            return self._experts_method(layer, prefix)
        if not isinstance(layer, LinearBase):
            self._refuse_quantized(layer, prefix)
            if not isinstance(layer, VocabParallelEmbedding):
                return None
            if not int8_wanted():
                return LeanEmbeddingMethod()
            self._in_8_bits = True
            return Int8EmbeddingMethod(prefix)
        names = self._claim(prefix, self.shard_names(prefix))
        if names is None:
            return UnquantizedLinearMethod()
        refuse_transformed(prefix, names[0], self.config)
        found = self._loaded_biases()
        biases = None if found is None else [found[name] for name in names]
        return BinaryMosLinearMethod(self.config, names, biases, self._is_read())

    def _name_in_modules(self, prefix: str) -> str:
        """What `modules` would call the layer that vLLM builds under `prefix`."""
        prefix = prefix.removeprefix(DRAFT_PREFIX)
        if not any(name.startswith(BASE_PREFIX) for name in self.modules):
            prefix = prefix.removeprefix(BASE_PREFIX)
        if MIXER in prefix and not any(MIXER in name for name in self.modules):
            prefix = prefix.replace(MIXER, MAMBA)
        return prefix

    def _experts_method(self, layer: RoutedExperts, prefix: str) -> QuantizeMethodBase | None:
        """The method for the feed-forward experts of a mixture-of-experts layer."""
        projections = (
            layer.ckpt_gate_proj_name,
            layer.ckpt_up_proj_name or layer.ckpt_gate_proj_name,
            layer.ckpt_down_proj_name,
        )
        count = layer.moe_config.num_logical_experts
        shards = [f"{prefix}.{i}.{name}" for i in range(count) for name in projections]
        names = self._claim(prefix, shards)
        if names is None:
            return None
        biases = self._loaded_biases()
        biased = [name for name in names if biases is not None and biases[name]]
        if biased:
            raise FormatError(
                f"{biased[0]}.{BIAS}: vllm-bmos does not serve feed-forward experts with biases. "
                r"Convert the model again with --ignore '\.experts'."
            )
        each = list(zip(names[::3], names[1::3], names[2::3], strict=True))
        return BinaryMosMoEMethod(self.config, layer.moe_config, each, complete=self._is_read())

    def _claim(self, prefix: str, shards: list[str]) -> list[str] | None:
        """Checkpoint names of the layers that vLLM serves as one; None if all are dense.

        Raises:
            ValueError: if some are quantized and some are not.
        """
        dense = [shard for shard in shards if shard not in self.modules]
        if len(dense) == len(shards):
            return None
        if dense:
            together = ", ".join(shards if len(shards) < 4 else [*shards[:3], "..."])
            raise ValueError(
                f"{prefix}: vLLM serves {together} as one merged layer, but {dense[0]} is not "
                "quantized while the rest is. Convert the model again with all of them quantized "
                "or all of them ignored."
            )
        if self.biases is None:
            self._read_checkpoint_at_load()
        self._check_machine()
        names = [self.modules[shard] for shard in shards]
        self._claimed.update(names)
        return names

    def get_cache_scale_mapper(self) -> "WeightsMapper":
        """Asked for by vLLM when a whole model is built and its weights are about to be loaded."""
        vllm_config = get_current_vllm_config_or_none()
        if vllm_config is None or vllm_config.parallel_config.pipeline_parallel_size > 1:
            return super().get_cache_scale_mapper()  # the rest is on other ranks
        left = sorted(set(self.modules.values()) - self._claimed)
        if left:
            logger.warning_once(
                "BinaryMoS: vLLM's model has no place for %d quantized layers, the first is %s. If "
                "it fails to load them, it builds such layers without quantization: convert the "
                r"model again with --ignore '\.(%s)$'.",
                len(left),
                left[0],
                "|".join(sorted({name.rpartition(".")[2] for name in left})),
            )
        if int8_wanted() and not self._in_8_bits:
            logger.warning_once(
                "BinaryMoS: %s changes nothing here: vLLM builds this model's embeddings and "
                "lm_head without quantization.",
                EMBEDDINGS_ENV,
            )
        return super().get_cache_scale_mapper()

    def shard_names(self, prefix: str) -> list[str]:
        """The logical layers, by vLLM's names, that vLLM merges into `prefix`, in order.

        A layer that is already fused on disk (Phi-3) is its own only shard.
        """
        parent, _, leaf = prefix.rpartition(".")
        merged = {**USUAL_MERGES, **self.packed_modules_mapping}
        if prefix in self.modules or leaf not in merged:
            return [prefix]
        head = f"{parent}." if parent else ""
        return [head + shard for shard in merged[leaf]]

    def _refuse_quantized(self, layer: torch.nn.Module, prefix: str) -> None:
        inside = sorted(m for m in self.modules if m == prefix or m.startswith(f"{prefix}."))
        if not inside:
            return
        raise ValueError(
            f"{inside[0]} is quantized in the checkpoint, but vllm-bmos does not serve quantized "
            f"{type(layer).__name__} yet. Convert the model again with --ignore "
            f"'{prefix.rpartition('.')[2]}'."
        )

    def _is_read(self) -> bool:
        """Whether every tensor has to come from the checkpoint's files."""
        vllm_config = get_current_vllm_config_or_none()
        return self.biases is not None if vllm_config is None else reads_checkpoint(vllm_config)

    def _loaded_biases(self) -> dict[str, bool] | None:
        """`biases`, or None where the load format does not use the files that have them."""
        return self.biases if self._is_read() else None

    def _check_machine(self) -> None:
        """What a CPU cannot hold, and what vLLM gets wrong there; before a layer is allocated."""
        vllm_config = get_current_vllm_config_or_none()
        if vllm_config is None or not current_platform.is_cpu():
            return
        if vllm_config.lora_config is not None:
            logger.warning_once(
                "vLLM on a CPU answers requests without an adapter with the adapter of the last "
                "slot: set --max-loras to one more than the adapters in use."
            )
        nbytes, self.nbytes = self.nbytes, 0  # once, not for every layer
        if nbytes:
            parallel = vllm_config.parallel_config
            # All of a machine's ranks are about to load their parts into the same memory.
            check_memory(nbytes // parallel.nnodes_within_dp, available_bytes())

    def _read_checkpoint_at_load(self) -> None:
        vllm_config = get_current_vllm_config_or_none()
        if vllm_config is None:
            return
        model = vllm_config.model_config
        if not reads_checkpoint(vllm_config) or model.model_weights:
            logger.info_once(
                "BinaryMoS: load format %s reads no checkpoint on a disk; its inventory is not "
                "checked.",
                vllm_config.load_config.load_format,
            )
            return
        path = Path(model.model)
        if not path.is_dir():
            # The same files that vLLM is about to fetch into the same cache.
            from huggingface_hub import snapshot_download

            path = Path(
                snapshot_download(
                    model.model,
                    revision=model.revision,
                    cache_dir=vllm_config.load_config.download_dir,
                    allow_patterns=["*.safetensors", INDEX_FILE, MANIFEST_FILE, "config.json"],
                )
            )
        self._read_checkpoint(path)

    def _read_checkpoint(self, path: Path) -> None:
        checkpoint = Checkpoint(path)
        if checkpoint.config != self.config:
            raise FormatError(
                f"{path}: quantization_config differs from the one vLLM was given (an override?). "
                "Serve the checkpoint with its own."
            )
        self.nbytes = sum(extent.nbytes for extent in checkpoint.extents.values())
        self.biases = {name: f"{name}.{BIAS}" in checkpoint.specs for name in self.config.modules}
