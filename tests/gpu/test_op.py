"""The op as vLLM uses it: compiled with a symbolic number of tokens, and captured in a graph."""

import pytest
import torch

from tests.gpu import DEVICE, needs_gpu
from tests.gpu.layers import prepared
from tests.kernels.triton.layers import config_of, random_bias, random_layer, random_x
from vllm_bmos import ops

pytestmark = needs_gpu

CONFIG = config_of(1144, [130, 5], 4)


@pytest.fixture(scope="module")
def layer():
    return prepared(random_layer(CONFIG), CONFIG)


def call(x, layer, bias=None, logits=None):
    return ops.linear(
        x, logits, layer.weight, layer.in_channel_scale, layer.out_channel_scale,
        layer.router_weight, bias, [130, 5], "triton",
    )  # fmt: skip


def both(x, layer, bias):
    """A layer with its own logits, and one with given ones, as a row-parallel layer has."""
    logits = ops.router_logits(x, layer.router_weight, 2, 4, "triton")
    return call(x, layer, bias) + call(x, layer, logits=logits * 0.5)


def test_compiled_with_a_symbolic_number_of_tokens(layer):
    bias = random_bias(CONFIG).to(DEVICE)

    @torch.compile(fullgraph=True, dynamic=True)
    def model(x):
        return torch.relu(both(x * 2, layer, bias))

    for M in (6, 2, 17, 70, 600):
        x = random_x(M, CONFIG).to(DEVICE)
        assert torch.equal(model(x), torch.relu(both(x * 2, layer, bias)))


@pytest.mark.parametrize("M", [1, 16, 40, 200, 600])
def test_captured_in_a_graph(layer, M):
    """A replay reads what x holds by then, and gives the bits of a plain call."""
    bias = random_bias(CONFIG).to(DEVICE)
    x = random_x(M, CONFIG).to(DEVICE)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        both(x, layer, bias)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = both(x, layer, bias)
    for seed in (5, 6):
        x.copy_(random_x(M, CONFIG, seed))
        y.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, both(x, layer, bias))
