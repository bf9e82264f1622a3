"""How much a served model holds: to show that no unpacked copy of the weights is kept."""

import torch
from torch import nn

from vllm_bmos.checkpoint.format import WEIGHT


def quantized_bytes(model: nn.Module) -> int:
    """Bytes of every tensor that hangs on a quantized layer of a vLLM model, by whatever name."""
    found = {}
    for layer in model.modules():
        if not hasattr(layer, WEIGHT):
            continue
        for holder in (layer._parameters, layer._buffers, vars(layer)):
            for value in holder.values():
                if isinstance(value, torch.Tensor):
                    found[value.data_ptr()] = value.nbytes
    return sum(found.values())
