"""Feed-forward experts of mixture-of-experts models: three layers each, however they are stored.

transformers holds all experts of a block in two 3-D weights, gate_up_proj [X, 2I, H] (gate's rows
before up's) and down_proj [X, H, I]. Files hold the experts' own 2-D weights, or these two.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from converters.options import Options
from vllm_bmos.checkpoint.format import FFN_EXPERT, FFN_EXPERT_NAMES, FormatError, TensorSpec
from vllm_bmos.integrations.experts import is_gated_mlp

GATE_UP, DOWN = "gate_up_proj", "down_proj"  # the 3-D weights, in files as in transformers
IN_EXPERTS = re.compile(r"\.(experts|expert)\.")
KEEP_DENSE = r"Pass --ignore '\.experts' to keep the experts as they are."


def is_experts(module: Any) -> bool:
    """Whether a module of transformers is a block's feed-forward experts, of gate, up and down.

    Biases, gates of a family's own and other orders of the dimensions are not taken for it.
    """
    weights = (getattr(module, name, None) for name in (GATE_UP, DOWN))
    return (
        all(getattr(weight, "ndim", 0) == 3 for weight in weights)
        and is_gated_mlp(module)
        and not getattr(module, "is_transposed", False)
        and getattr(module, "is_concatenated", True)
    )


def expert_shapes(
    module: Any, paths: Iterable[str], specs: Mapping[str, TensorSpec]
) -> dict[str, tuple[int, int]]:
    """(N, K) of the layers of a block's feed-forward experts, by their names in the files.

    Args:
        module: for which `is_experts` holds.
        paths: what it may be called in the files.
        specs: of the files' tensors.

    Returns:
        Nothing if the files do not have them as 2-D weights.

    Raises:
        FormatError: if there are more experts than tensors.
    """
    X, N, H = module.gate_up_proj.shape
    if X > len(specs) and not any(name.endswith(GATE_UP) for name in specs):
        raise FormatError(
            f"config.json asks for {X} experts in a block, but the model has {len(specs)} tensors."
        )
    for path in paths:
        for names in FFN_EXPERT_NAMES:
            if f"{path}.0.{names[0]}.weight" in specs:
                shapes = dict(zip(names, ((N // 2, H), (N // 2, H), (H, N // 2)), strict=True))
                return {f"{path}.{i}.{n}": s for i in range(X) for n, s in shapes.items()}
    return {}


def check_experts(modules: Mapping[str, Any], names: Iterable[str], options: Options) -> None:
    """Refuse experts that would stay dense unasked, and a block whose experts are only half packed.

    Args:
        modules: the layers to pack.
        names: of the source's tensors.
        options: with --ignore.

    Raises:
        FormatError: naming a tensor, or the block.
    """
    packed: dict[str, set[bool]] = defaultdict(set)
    for name in names:
        module = name.removesuffix(".weight")
        if not IN_EXPERTS.search(name):
            continue
        if module not in modules and not options.ignores(module):
            raise FormatError(
                f"{name}: feed-forward experts of this layout are not supported. {KEEP_DENSE}"
            )
        if match := FFN_EXPERT.fullmatch(module):
            packed[match[1]].add(module in modules)
    for experts, found in packed.items():
        if len(found) > 1:
            raise FormatError(
                f"{experts}: --ignore leaves some of its feed-forward experts dense, and vLLM "
                "serves them as one. Ignore all of a block's experts or none."
            )
