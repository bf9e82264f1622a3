"""Stages that fit the tensors of a BinaryMoS layer to a dense weight, one file a stage.

`svid` looks at one weight at a time. The others look at the whole model on text; `run.py` runs
them, and each but `hessian` starts from the result of the one that it names in `FITTED_STAGES`, or
from any packed checkpoint.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import torch

from converters.fitting import svid
from converters.moe import IN_EXPERTS
from vllm_bmos.checkpoint.format import FFN_EXPERT, FormatError

if TYPE_CHECKING:
    from converters.plan import Plan

# A stage maps a layer's weight [N, K] and E to its tensors, by their names in the format.
Stage = Callable[[torch.Tensor, int], dict[str, torch.Tensor]]

STAGES: dict[str, Stage] = {"svid": svid.fit}
FITTED_STAGES: dict[str, str | None] = {
    "hessian": None,
    "block": "hessian",
    "kd-scales": "hessian",
    "qat": "hessian",
    "experts": "qat",
}
BY_BLOCK = {"hessian", "block"}  # a decoder block is loaded at a time


def stages_up_to(stage: str) -> Iterator[str]:
    """The stages that lead to one, in order."""
    before = FITTED_STAGES[stage]
    if before is not None:
        yield from stages_up_to(before)
    yield stage


def check_fittable(plan: "Plan", stages: Iterable[str]) -> None:
    """Raise FormatError unless fitted stages can fit all that is to be packed."""
    stages = list(stages)
    source, last = plan.source, stages[-1]
    if source.stage is None:
        raise FormatError(
            f"--stage {last}: {source.path} is binary already; only a dense model can be fitted. "
            "Leave --stage out."
        )
    by_block = BY_BLOCK.intersection(stages)
    experts = [name for name in source.modules if FFN_EXPERT.fullmatch(name)]
    experts += [name for name in source.store.specs if by_block and IN_EXPERTS.search(name)]
    if experts:
        raise FormatError(
            f"{experts[0]}: --stage {min(by_block, default=last)} cannot fit a mixture of experts. "
            r"Use --stage svid; with --ignore '\.experts' its result can be the --start-from of "
            "kd-scales, qat and experts, which then fit the other layers, with the same --ignore."
        )
