"""Copies checkpoint tensors into one vLLM layer, and knows what has not arrived yet.

vLLM's own loaders slice by rules of their own for each layer class, do not notice a shard of a
merged layer that never comes, and turn a wrong shape into a bare assertion. One loader of our own
covers plain, merged (q/k/v, gate/up) and fused-on-disk (Phi-3) layers on any tensor-parallel rank.
"""

from collections import Counter
from dataclasses import dataclass

import torch

from vllm_bmos.checkpoint.format import (
    IN_SCALE,
    OUT_SCALE,
    REQUIRED,
    ROUTER,
    SCALES,
    WEIGHT,
    FormatError,
    linear_specs,
)

QKV_SHARDS = {"q": 0, "k": 1, "v": 2}


def suffix_of(param: torch.nn.Parameter, name: str) -> str:
    """The format's name of a parameter that is allocated, and not yet prepared for a kernel.

    Raises:
        ValueError: if it has been prepared; `name` is then the layer in the message.
    """
    suffix: str | None = getattr(param, "bmos_suffix", None)
    if suffix is None:
        raise ValueError(
            f"{name}: its tensors have been laid out for a kernel, so that checkpoint tensors "
            "cannot be copied into them. Use vLLM's reload_weights in place of load_weights."
        )
    return suffix


@dataclass(frozen=True)
class Slice:
    """Which part of a dimension this rank holds: [start, start + size) of `full`."""

    start: int
    size: int
    full: int


class LayerLoader:
    """The weight loader of every parameter of one quantized layer.

    Args:
        names: checkpoint names of the layer's logical shards: S of them, or one that holds all
            of vLLM's shards if the layer is fused on disk.
        inputs: this rank's part of K.
        outputs: this rank's part of N of each of vLLM's shards.
        num_experts: E.
        scale_dtype: dtype of the scales, as the checkpoint's config spells it.
    """

    def __init__(
        self,
        names: list[str],
        inputs: Slice,
        outputs: list[Slice],
        num_experts: int,
        scale_dtype: str,
    ) -> None:
        self.names = names
        self.inputs = inputs
        self.outputs = outputs
        self.num_experts = num_experts
        self.scale_dtype = scale_dtype
        self.loaded: Counter[tuple[str, int]] = Counter()

    @property
    def fused_on_disk(self) -> bool:
        """Whether one checkpoint layer holds all of vLLM's shards."""
        return len(self.names) == 1 and len(self.outputs) > 1

    def weight_loader(
        self,
        param: torch.nn.Parameter,
        loaded_weight: torch.Tensor,
        loaded_shard_id: str | int | None = None,
    ) -> None:
        """What vLLM calls: `load` into the parameter of a layer."""
        self.load(param.data, suffix_of(param, self.names[0]), loaded_weight, loaded_shard_id)

    def load(
        self,
        data: torch.Tensor,
        suffix: str,
        loaded_weight: torch.Tensor,
        loaded_shard_id: str | int | None = None,
    ) -> None:
        """Check one checkpoint tensor and copy this rank's part of it into `data`.

        Raises:
            FormatError: if its dtype or shape is wrong, it is not finite, or it came before.
        """
        shards = self._shards(suffix, loaded_shard_id)
        name = f"{self.names[0 if self.fused_on_disk else shards[0]]}.{suffix}"
        self._check(name, suffix, shards, loaded_weight)
        for shard in shards:
            self._copy(data, suffix, shard, shards, loaded_weight)
            # vLLM's reload first runs loaders on meta tensors, to count elements.
            if not data.is_meta:
                self.loaded[suffix, shard] += 1
                if self.loaded[suffix, shard] > 1:
                    raise FormatError(
                        f"{name} was loaded twice. The checkpoint holds it more than once; "
                        "convert it again."
                    )

    def check_complete(self) -> None:
        """Raise FormatError naming the first tensor that never arrived; then start afresh."""
        for suffix in REQUIRED:
            for shard in range(len(self.outputs)):
                if not self.loaded[suffix, shard]:
                    name = self.names[0 if self.fused_on_disk else shard]
                    raise FormatError(
                        f"{name}.{suffix} was not loaded: it is missing from the checkpoint. "
                        "Convert or download it again."
                    )
        self.loaded.clear()

    def _shards(self, suffix: str, shard_id: str | int | tuple[int, ...] | None) -> list[int]:
        if shard_id is None:
            shards = list(range(len(self.outputs)))
        elif isinstance(shard_id, list | tuple):
            shards = [QKV_SHARDS.get(i, i) for i in shard_id]  # type: ignore[call-overload]
        elif isinstance(shard_id, str):
            shards = [QKV_SHARDS[shard_id]]
        else:
            shards = [shard_id]
        if len(shards) > 1 and not self.fused_on_disk:
            raise FormatError(
                f"{', '.join(self.names)}: vLLM loads {suffix} of these layers as one tensor, but "
                "they are separate in quantization_config.modules. Convert the model again."
            )
        return shards

    def _check(self, name: str, suffix: str, shards: list[int], loaded: torch.Tensor) -> None:
        N = sum(self.outputs[shard].full for shard in shards)
        spec = linear_specs(N, self.inputs.full, self.num_experts, self.scale_dtype)[suffix]
        dtype = torch.uint8 if suffix == WEIGHT else getattr(torch, self.scale_dtype)
        if tuple(loaded.shape) != spec.shape or loaded.dtype != dtype:
            split = any(part.size != part.full for part in (self.inputs, *self.outputs))
            raise FormatError(
                f"{name}: the model of config.json needs {dtype} {list(spec.shape)}, found "
                f"{loaded.dtype} {list(loaded.shape)}. config.json and the weights do not belong "
                "together, or one of them is damaged; convert the model again."
                + (" Or vLLM splits it in a way of its own: try one rank." if split else "")
            )
        if suffix in SCALES and not loaded.is_meta and not torch.isfinite(loaded).all():
            raise FormatError(
                f"{name} holds NaN or infinite values. Its outputs would be NaN; convert the "
                "model again."
            )

    def _copy(
        self,
        data: torch.Tensor,
        suffix: str,
        shard: int,
        shards: list[int],
        loaded: torch.Tensor,
    ) -> None:
        outputs = self.outputs[shard]
        # Rows before this shard: on disk if fused, and in this rank's parameter.
        disk = sum(self.outputs[s].full for s in shards if s < shard) + outputs.start
        here = sum(out.size for out in self.outputs[:shard])
        K = self.inputs
        if suffix == WEIGHT:
            source = loaded[disk : disk + outputs.size, K.start // 8 : (K.start + K.size + 7) // 8]
            data[here : here + outputs.size].copy_(source)
        elif suffix == OUT_SCALE:
            data[:, here : here + outputs.size].copy_(loaded[:, disk : disk + outputs.size])
        else:
            assert suffix in (IN_SCALE, ROUTER)
            data[shard].copy_(loaded[:, K.start : K.start + K.size])
