"""Binary rounding of a row's weights around their mean, which PB-LLM and BiLLM share."""

import torch


def binary_levels(W: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [N], and mean distance from it [N], of the weights of each row inside the mask."""
    count = mask.sum(dim=1).clamp_min(1)
    mean = (W * mask).sum(dim=1) / count
    return mean, ((W - mean[:, None]).abs() * mask).sum(dim=1) / count
