"""Tensors in the checkpoint's layout, before a kernel replaces them."""

import gc
from pathlib import Path

import pytest
import torch

from vllm_bmos.checkpoint.format import IN_SCALE, OUT_SCALE, ROUTER, WEIGHT, packed_width
from vllm_bmos.kernels import LinearConfig
from vllm_bmos.plugin.parameters import empty_tensors, register_tensors

CONFIG = LinearConfig(
    K=4101,
    shard_sizes=(4096, 7),
    E=3,
    dtype=torch.bfloat16,
    scale_dtype=torch.float16,
    device="cpu",
)


def resident_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


def test_parameters_say_where_their_outputs_lie() -> None:
    layer = torch.nn.Module()
    tensors = empty_tensors(CONFIG)
    register_tensors(layer, tensors, lambda *_: None)
    found = {name: getattr(p, "output_dim", None) for name, p in layer.named_parameters()}
    assert found == {
        WEIGHT: 0,
        OUT_SCALE: 1,
        IN_SCALE: None,
        ROUTER: None,
    }
    assert tensors.weight.shape[0] == tensors.out_channel_scale.shape[1] == CONFIG.N


@pytest.mark.parametrize("stack", [(), (5,)])
def test_shapes_and_dtypes(stack: tuple[int, ...]) -> None:
    tensors = empty_tensors(CONFIG, *stack)
    assert tensors.weight.shape == (*stack, 4103, packed_width(4101))
    assert tensors.in_channel_scale.shape == (*stack, 2, 3, 4101)
    assert tensors.out_channel_scale.shape == (*stack, 3, 4103)
    assert tensors.router_weight.shape == (*stack, 2, 3, 4101)
    assert tensors.weight.dtype == torch.uint8
    assert {t.dtype for t in tensors.in_order()[1:]} == {torch.float16}
    for tensor in tensors.in_order():
        tensor.fill_(1)


def test_they_are_on_the_default_device() -> None:
    with torch.device("meta"):
        assert all(t.is_meta for t in empty_tensors(CONFIG).in_order())


def test_their_memory_goes_back_to_the_system() -> None:
    def fill() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Weights of 2 MB, and between them small tensors that stay."""
        weights, small = [], []
        for _ in range(50):
            weights.append(empty_tensors(CONFIG).weight.fill_(1))
            small.append(torch.ones(1000))
        return weights, small

    fill()  # malloc learns from what is freed here that such sizes are worth keeping
    weights, small = fill()
    total = sum(weight.nbytes for weight in weights)
    before = resident_bytes()
    del weights
    gc.collect()
    assert before - resident_bytes() > 0.9 * total > 90e6
    assert all(bool((tensor == 1).all()) for tensor in small)
