import pytest
import torch
from torch import nn

from converters.fitting import svid
from converters.fitting.experts import (
    cluster,
    fit_router,
    merge_where_useless,
    split,
    with_experts,
)
from converters.fitting.student import TrainableLinear, trainable_layers
from vllm_bmos.checkpoint.format import IN_SCALE, OUT_SCALE, ROUTER

N, K, E = 12, 40, 3


def blobs(M=300, seed=0):
    """Tokens around E directions, of sizes from 0.1 to 10."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(E, K, generator=generator)
    kind = torch.randint(0, E, (M,), generator=generator)
    x = centres[kind] + 0.3 * torch.randn(M, K, generator=generator)
    return x * 10 ** (2 * torch.rand(M, 1, generator=generator) - 1), kind


def test_clusters_are_directions_whatever_the_size():
    x, kind = blobs()
    found = cluster(x, E, torch.Generator().manual_seed(1))
    pairs = set(zip(kind.tolist(), found.tolist(), strict=True))
    assert len(pairs) == E  # one name for each


def test_the_router_predicts_clusters_of_new_tokens():
    x, kind = blobs()
    R = fit_router(x, kind, E)
    new, expected = blobs(200, seed=0)
    G = (new @ R.T).softmax(-1)
    assert float((G.argmax(-1) == expected).float().mean()) > 0.95
    assert float(G.max(-1).values.mean()) > 0.7


class Model(nn.Module):
    """Two layers behind each other."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        shapes = ((K, K), (N, K))
        layers = [TrainableLinear(svid.fit(torch.randn(s), 1), s, None) for s in shapes]
        self.layers = nn.ModuleList([nn.Sequential(layer) for layer in layers])

    def get_decoder(self):
        return self

    def forward(self, tokens, use_cache=True):
        x = blobs()[0].expand(len(tokens), -1, -1)
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_split_changes_nothing_yet():
    model, tokens = Model(), torch.zeros(1, 300)
    before = model(tokens)
    for name, tensors in split(model, tokens, E, 0).items():
        assert tensors[ROUTER].shape == (E, K) and tensors[ROUTER].abs().sum() > 0
        shape = model.get_submodule(name).latent.shape
        model.set_submodule(name, TrainableLinear(tensors, tuple(shape), None))
    torch.testing.assert_close(model(tokens), before, rtol=1e-4, atol=1e-4)
    assert all(layer.E == E for layer in trainable_layers(model).values())


@pytest.mark.parametrize("apart", ["start_out", "factor_out"])
def test_experts_stay_only_in_blocks_that_they_help(apart):
    """Whether they differ from the start on or by what was trained."""
    model, tokens = Model(), torch.zeros(1, 300)
    for name, tensors in split(model, tokens, E, 0).items():
        shape = model.get_submodule(name).latent.shape
        model.set_submodule(name, TrainableLinear(tensors, tuple(shape), None))
    useless, useful = (layer[0] for layer in model.layers)
    with torch.no_grad():
        useful.factor_out += torch.randn(E, N, generator=torch.Generator().manual_seed(0))
        wanted, equal, best = model(tokens), useless.S_out.clone(), useful.S_out.clone()
        noise = torch.randn(E, K, generator=torch.Generator().manual_seed(1))
        getattr(useless, apart).mul_(1 + noise - noise.mean(0))
    kept = merge_where_useless(model, lambda: float((model(tokens) - wanted).square().mean()))
    assert kept == 1
    torch.testing.assert_close(useless.S_out, equal, rtol=1e-5, atol=1e-5)
    assert torch.equal(useful.S_out, best) and not torch.equal(best[0], best[1])


def test_merging_leaves_what_training_started_from():
    tensors = svid.fit(torch.randn(N, K), E)
    tensors[IN_SCALE] = tensors[IN_SCALE].float() * torch.rand(E, 1)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    layer = TrainableLinear(tensors, (N, K), None)
    layer.merge_experts()
    assert torch.equal(layer.S_in[0], layer.S_in[1])
    assert all(torch.equal(tensors[name], before[name]) for name in before)


def test_equal_experts_are_counted_as_wanted_and_different_ones_are_kept():
    tensors = {f"m.{k}": v for k, v in svid.fit(torch.randn(N, K), 4).items()}
    tensors[f"m.{ROUTER}"] = torch.randn(4, K)
    one = with_experts(tensors, ["m"], 1)
    assert len(one[f"m.{IN_SCALE}"]) == len(one[f"m.{ROUTER}"]) == 1
    two = with_experts(one, ["m"], 2)
    assert two[f"m.{OUT_SCALE}"].shape == (2, N)
    assert torch.equal(two[f"m.{OUT_SCALE}"][1], tensors[f"m.{OUT_SCALE}"][0])
    tensors[f"m.{IN_SCALE}"][1] *= 2
    assert torch.equal(with_experts(tensors, ["m"], 1)[f"m.{IN_SCALE}"], tensors[f"m.{IN_SCALE}"])


@pytest.mark.parametrize("E", [1, 2, 8])
def test_any_number_of_clusters_works(E):
    x, _ = blobs(50)
    found = cluster(x, E, torch.Generator().manual_seed(0))
    assert found.min() >= 0 and found.max() < E
