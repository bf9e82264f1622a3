"""What a baseline makes of one layer."""

from typing import NamedTuple

import torch


class Quantized(NamedTuple):
    """A fake-quantized layer.

    Attributes:
        weight: what the layer computes with [N, K], float32.
        bits: per weight, of all that would have to be stored: codes, masks, scales, zero points.
        published: bits per weight as the method's own paper counts them.
    """

    weight: torch.Tensor
    bits: float
    published: float
