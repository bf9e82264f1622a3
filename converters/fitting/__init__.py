"""Stages that fit the tensors of a BinaryMoS layer to a dense weight, one file a stage."""

from collections.abc import Callable

import torch

from converters.fitting import svid

# A stage maps a layer's weight [N, K] and E to its tensors, by their names in the format.
Stage = Callable[[torch.Tensor, int], dict[str, torch.Tensor]]

STAGES: dict[str, Stage] = {"svid": svid.fit}
