"""Stages that fit the tensors of a BinaryMoS layer to a dense weight, one file a stage.

`svid` looks at one weight at a time. The others look at the whole model on text; `run.py` runs
them, and each starts from the result of the one that it names in `FITTED_STAGES`, or from any
packed checkpoint.
"""

from collections.abc import Callable

import torch

from converters.fitting import svid

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
