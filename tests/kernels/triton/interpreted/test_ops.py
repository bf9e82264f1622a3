"""The op contract of the Triton kernel: schema, fake, dynamic shapes, one graph."""

import pytest
import torch

from tests.kernels.triton.layers import config_of, random_bias, random_layer, random_x
from vllm_bmos import ops
from vllm_bmos.kernels.triton import TritonKernel

CONFIG = config_of(200, [70, 33], 3)


@pytest.fixture(scope="module")
def layer():
    return TritonKernel().prepare(random_layer(CONFIG), CONFIG)


def call(x, layer, bias=None, logits=None):
    return ops.linear(
        x, logits, layer.weight, layer.in_channel_scale, layer.out_channel_scale,
        layer.router_weight, bias, [70, 33], "triton",
    )  # fmt: skip


@pytest.mark.parametrize("M", [1, 5])
def test_opcheck(layer, M):
    x = random_x(M, CONFIG)
    torch.library.opcheck(ops.router_logits.default, (x, layer.router_weight, 2, 3, "triton"))
    torch.library.opcheck(
        torch.ops.vllm_bmos.linear.default,
        (
            x, None, layer.weight, layer.in_channel_scale, layer.out_channel_scale,
            layer.router_weight, random_bias(CONFIG), [70, 33], "triton",
        ),
    )  # fmt: skip


def test_one_graph_for_every_batch(layer):
    """vLLM compiles with a symbolic number of tokens: one graph, one node, no recompilation."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, dynamic=True, backend=backend)
    def model(x):
        return call(x, layer, logits=ops.router_logits(x, layer.router_weight, 2, 3, "triton")) * 2

    for M in (6, 2, 3, 17, 70):
        x = random_x(M, CONFIG)
        assert torch.equal(model(x), call(x, layer) * 2)
    assert len(graphs) == 1
    targets = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert sum("vllm_bmos" in target for target in targets) == 2


def test_inputs_are_not_written(layer):
    x = random_x(5, CONFIG)
    before = [x.clone(), layer.weight.clone(), layer.router_weight.clone()]
    call(x, layer)
    assert all(map(torch.equal, before, (x, layer.weight, layer.router_weight)))
