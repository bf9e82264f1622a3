"""Splits the 3-D weights of feed-forward experts in a model's files into their experts' own."""

import math
import re
from collections.abc import Mapping
from typing import Any

from converters.moe import DOWN, GATE_UP, KEEP_DENSE
from converters.options import Options
from converters.sources.store import FileStore, Store
from vllm_bmos.checkpoint.container import Extent
from vllm_bmos.checkpoint.format import FFN_EXPERT_NAMES, FormatError, TensorSpec

FUSED = re.compile(rf"(.+\.experts)\.{GATE_UP}")
# Families whose files are known to come with 3-D weights as transformers lays them out.
FUSED_MODELS = ("qwen3_moe",)


def split_experts(store: Store, model_config: Mapping[str, Any], options: Options) -> Store:
    """Give every feed-forward expert of 3-D weights its own 2-D weights, by place in the file.

    Raises:
        FormatError: for another layout than the one in `converters.moe`.
    """
    fused = [match[1] for name in store.specs if (match := FUSED.fullmatch(name))]
    fused = [experts for experts in fused if not options.ignores(f"{experts}.{GATE_UP}")]
    if not fused:
        return store
    model_type = model_config.get("model_type")
    if model_type not in FUSED_MODELS or not isinstance(store, FileStore):
        raise FormatError(
            f"{fused[0]}.{GATE_UP}: 3-D weights of feed-forward experts can be split for "
            f"{', '.join(FUSED_MODELS)} in safetensors or .bin files, and this is {model_type!r} "
            f"in {store.files[0].name}. {KEEP_DENSE}"
        )
    extents = dict(store.extents)
    for experts in fused:
        gate_up = extents.pop(f"{experts}.{GATE_UP}")
        down = extents.pop(f"{experts}.{DOWN}", None)
        shape, other = gate_up.spec.shape, None if down is None else down.spec.shape
        if down is None or len(shape) != 3 or other != (shape[0], shape[2], shape[1] // 2):
            raise FormatError(
                f"{experts}.{GATE_UP} and {DOWN}: expected [X, 2I, H] and [X, H, I] for X experts, "
                f"found {list(shape)} and {other and list(other)}. {KEEP_DENSE}"
            )
        X, H, inner = shape[0], shape[2], shape[1] // 2
        gate, up, last = (f"{experts}.{{}}.{name}.weight" for name in FFN_EXPERT_NAMES[0])
        for i in range(X):
            extents[gate.format(i)] = _rows(gate_up, 2 * i * inner, inner)
            extents[up.format(i)] = _rows(gate_up, (2 * i + 1) * inner, inner)
            extents[last.format(i)] = _rows(down, i * H, H)
    return FileStore(extents)


def _rows(extent: Extent, first: int, count: int) -> Extent:
    """Rows of a tensor whose leading dimensions count as one."""
    flat = math.prod(extent.spec.shape[:-1]), extent.spec.shape[-1]
    whole = Extent(extent.file, extent.offset, TensorSpec(extent.spec.dtype, flat))
    return whole.rows(first, first + count)
