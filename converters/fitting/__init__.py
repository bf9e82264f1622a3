"""Stages that fit the tensors of a BinaryMoS layer to a dense weight, one file a stage.

`svid` looks at one weight at a time. The others look at the whole model on text; `run.py` runs
them, and each but `hessian` starts from the result of the one that it names in `FITTED_STAGES`, or
from any packed checkpoint.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from converters.fitting import svid
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


def stages_up_to(stage: str) -> Iterator[str]:
    """The stages that lead to one, in order."""
    before = FITTED_STAGES[stage]
    if before is not None:
        yield from stages_up_to(before)
    yield stage


def check_fittable(plan: "Plan", stage: str) -> None:
    """Raise FormatError unless a fitted stage can fit all that is to be packed."""
    if plan.source.stage is None:
        raise FormatError(
            f"--stage {stage}: {plan.source.path} is binary already; only a dense model can "
            "be fitted. Leave --stage out."
        )
    experts = [name for name in plan.source.modules if FFN_EXPERT.fullmatch(name)]
    if experts:
        raise FormatError(
            f"{experts[0]}: --stage {stage} cannot fit the experts of a mixture-of-experts "
            r"model. Use --stage svid, or keep them dense with --ignore '\.experts'."
        )
