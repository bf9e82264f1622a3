"""The data-free stage."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.fitting.svid import fit, rank_one
from tests.converters.models import sign_bits
from vllm_bmos.kernels import LinearTensors
from vllm_bmos.kernels.reference import ReferenceKernel


@settings(deadline=None)
@given(N=st.integers(1, 40), K=st.integers(1, 40), seed=st.integers(0, 2**32))
def test_rank_one_against_a_full_svd(N, K, seed):
    magnitude = torch.randn(N, K, generator=torch.Generator().manual_seed(seed)).abs()
    a, b = rank_one(magnitude)
    U, S, Vh = torch.linalg.svd(magnitude.double(), full_matrices=False)
    best = S[0] * torch.outer(U[:, 0], Vh[0])
    # The error of the product, not of the vectors: where two singular values are close, only the
    # product is well determined. Its excess over the optimum is what matters.
    error = (torch.outer(a, b).double() - magnitude.double()).norm()
    assert error <= (best - magnitude.double()).norm() * (1 + 1e-4) + 1e-6 * S[0]
    assert (a >= 0).all() and (b >= 0).all()
    torch.testing.assert_close(a.norm(), b.norm())


def test_rank_one_recovers_a_product():
    a, b = torch.rand(30) + 0.1, torch.rand(50) + 0.1
    found_a, found_b = rank_one(torch.outer(a, b))
    torch.testing.assert_close(torch.outer(found_a, found_b), torch.outer(a, b))


def test_rank_one_of_zeros():
    a, b = rank_one(torch.zeros(3, 5))
    assert a.tolist() == [0] * 3 and b.tolist() == [0] * 5
    magnitude = torch.rand(4, 6)
    magnitude[1], magnitude[:, 2] = 0, 0
    a, b = rank_one(magnitude)
    assert a[1] == 0 and b[2] == 0 and torch.isfinite(a).all() and torch.isfinite(b).all()


@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1e15])
def test_rank_one_of_tiny_and_huge_weights(scale):
    magnitude = torch.rand(20, 30)
    a, b = rank_one(magnitude * scale)
    a1, b1 = rank_one(magnitude)
    torch.testing.assert_close(torch.outer(a, b) / scale, torch.outer(a1, b1))


@pytest.mark.parametrize("E", [1, 2, 4, 7])
def test_any_number_of_experts_is_exactly_onebit(E):
    torch.manual_seed(0)
    weight = torch.randn(24, 37)
    weight[0, 0], weight[1, 1] = 0.0, -0.0
    layer = fit(weight, E)
    assert torch.equal(layer["weight_packed"], sign_bits(weight))
    assert (layer["weight_packed"][0, 0] & 1, layer["weight_packed"][1, 0] >> 1 & 1) == (1, 1)
    a, b = layer["out_channel_scale"][0], layer["in_channel_scale"][0]
    B = torch.where(weight >= 0, 1.0, -1.0)
    x = torch.randn(5, 37)
    tensors = LinearTensors(
        layer["weight_packed"],
        layer["in_channel_scale"][None],
        layer["out_channel_scale"],
        layer["router_weight"][None],
    )
    y = ReferenceKernel().linear(x, None, tensors, None, [24])
    torch.testing.assert_close(y, ((x * b) @ B.T) * a)


def test_bfloat16_weights_are_fitted_in_float32():
    weight = torch.randn(8, 16).bfloat16()
    layer = fit(weight, 2)
    assert layer["in_channel_scale"].dtype == torch.float32
    torch.testing.assert_close(
        layer["in_channel_scale"], fit(weight.float(), 2)["in_channel_scale"]
    )
