"""A packed model in transformers on the GPU: with the reference op, and with Triton's kernels."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tests.gpu import DEVICE, needs_gpu
from tests.tiny import make_packed
from vllm_bmos import ops
from vllm_bmos.integrations.transformers import BinaryMosLinear
from vllm_bmos.kernels import LinearConfig, LinearTensors, choose_kernel

pytestmark = needs_gpu

BAR = {torch.float16: 2e-2, torch.bfloat16: 1.6e-1}
"""||logits - want|| / ||want|| against float32 on the CPU: twice what half precision costs this
tiny model, whose random layers amplify every rounding. A wrong layer gives about 1."""


def use_chosen_kernel(layer: BinaryMosLinear, dtype: torch.dtype) -> str:
    """Let a loaded layer run the kernel that serving would choose for it."""
    E, K = layer.in_channel_scale.shape
    sizes = [layer.out_features]
    scale_dtype = layer.in_channel_scale.dtype
    config = LinearConfig(K, tuple(sizes), E, dtype, scale_dtype, DEVICE)
    kernel = choose_kernel(config)
    loaded = LinearTensors(
        layer.weight_packed,
        layer.in_channel_scale.unsqueeze(0),
        layer.out_channel_scale,
        layer.router_weight.unsqueeze(0),
    )
    tensors = kernel.prepare(loaded, config)

    def forward(x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, K)
        y = ops.linear(tokens, None, *tensors.in_order(), layer.bias, sizes, kernel.name)
        return y.view(*x.shape[:-1], layer.out_features)

    layer.forward = forward
    return kernel.name


def logits_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens.to(next(model.parameters()).device)).logits.double().cpu()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_logits_agree_with_the_cpu(tmp_path, dtype):
    path = make_packed("qwen2", tmp_path)
    tokens = torch.arange(3, 203).remainder(500).view(4, 50)
    want = logits_of(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), tokens)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(DEVICE)
    reference = logits_of(model, tokens)
    layers = [module for module in model.modules() if isinstance(module, BinaryMosLinear)]
    assert layers and {use_chosen_kernel(layer, dtype) for layer in layers} == {"triton"}
    for found in (reference, logits_of(model, tokens)):
        assert float((found - want).norm() / want.norm()) <= BAR[dtype]
    generated = model.generate(tokens[:, :8].to(DEVICE), max_new_tokens=8, do_sample=False)
    assert generated.shape == (4, 16)
