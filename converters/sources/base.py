"""What every kind of source gives: a config, layers to pack, and tensors to carry over."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from converters.sources.store import Store
from vllm_bmos.checkpoint.format import FormatError, TensorSpec
from vllm_bmos.checkpoint.signs import pack_signs


class PackedLayer(NamedTuple):
    """One converted layer.

    Attributes:
        tensors: the layer's tensors by their names in the format, scales in any float dtype.
        zeros: weights of the source that were 0 and became +1.
    """

    tensors: dict[str, torch.Tensor]
    zeros: int


class Source(ABC):
    """A model to convert. Subclasses say how its layers become binary.

    Attributes:
        kind: one word for logs and provenance.
        path: what the user named.
        files: the directory whose tokenizer and other side files travel along.
        config: config.json for the result, without quantization_config.
        store: the stored tensors.
        modules: (N, K) of every layer to pack, by name.
        carried: stored tensors that are copied as they are.
        experts: E.
        scale_dtype: dtype of every scale of the result.
        license: name of the licence, if the source's own metadata gives one.
        output_norm: what every layer ends in; None for BinaryMoS itself.
        stage: how layers become binary; None if the source's layers are binary already.
    """

    kind: ClassVar[str]

    path: Path
    files: Path
    config: dict[str, Any]
    store: Store
    modules: dict[str, tuple[int, int]]
    experts: int
    scale_dtype: str
    license: str | None = None
    output_norm: str | None = None
    stage: str | None = None

    @property
    def carried(self) -> list[str]:
        """Every stored tensor that no packed layer uses up."""
        used = {f"{module}.{suffix}" for module in self.modules for suffix in self.suffixes}
        return [name for name in self.store.specs if name not in used]

    @property
    @abstractmethod
    def suffixes(self) -> tuple[str, ...]:
        """Names, behind the module's, of the stored tensors that a packed layer uses up."""

    @abstractmethod
    def layer(self, module: str) -> PackedLayer:
        """Convert one layer. Threads may call this at the same time.

        Raises:
            FormatError: naming the tensor that holds NaN or infinity.
        """


def pack_blocks(name: str, blocks: Iterable[torch.Tensor]) -> tuple[torch.Tensor, int]:
    """Signs of a weight that comes in blocks of rows; zeros (of either sign) become +1.

    Returns:
        uint8 [N, ceil(K/8)], and the number of zeros.

    Raises:
        FormatError: if the weight holds NaN or infinity.
    """
    packed, zeros = [], 0
    for block in blocks:
        positive, count = signs(name, block)
        packed.append(pack_signs(positive))
        zeros += count
    return torch.cat(packed), zeros


def signs(name: str, weight: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Where a weight is not negative, and its number of zeros.

    The bit patterns are compared as integers, which is several times faster than torch's float16
    arithmetic on a CPU: without the sign bit, zero is 0 and infinity and NaN are the largest.

    Raises:
        FormatError: if the weight holds NaN or infinity.
    """
    integer = _SAME_SIZE[weight.dtype]
    infinity = torch.tensor(float("inf"), dtype=weight.dtype).view(integer).item()
    bits = weight.view(integer).numpy()
    magnitude = bits & np.iinfo(bits.dtype).max
    if magnitude.max() >= infinity:
        raise FormatError(f"{name} holds NaN or infinity. The source is damaged.")
    zeros = magnitude.size - int(np.count_nonzero(magnitude))
    positive = bits >= 0
    if zeros:
        positive |= magnitude == 0
    return torch.from_numpy(positive), zeros


_SAME_SIZE = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}


def expect(name: str, found: TensorSpec | None, shape: tuple[int, ...]) -> TensorSpec:
    """Check that a source's tensor exists as floats of this shape.

    Raises:
        FormatError: naming the tensor.
    """
    if found is None:
        raise FormatError(f"{name} is missing. The source is incomplete; download it again.")
    if found.dtype not in ("F16", "BF16", "F32") or found.shape != shape:
        raise FormatError(
            f"{name}: expected a float16, bfloat16 or float32 tensor {list(shape)}, found "
            f"{found}. The source is damaged or of another layout."
        )
    return found


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
