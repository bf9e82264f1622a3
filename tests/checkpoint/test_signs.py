"""Signs to bits and back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_bmos.checkpoint.format import FormatError, packed_width
from vllm_bmos.checkpoint.signs import pack_signs, padding_is_zero, unpack_signs


@settings(deadline=None)
@given(N=st.integers(0, 9), K=st.integers(1, 70), seed=st.integers(0, 2**32))
def test_round_trip(N, K, seed):
    positive = torch.rand(N, K, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack_signs(positive)
    assert packed.dtype == torch.uint8 and packed.shape == (N, packed_width(K))
    assert torch.equal(unpack_signs(packed, K) > 0, positive)
    assert torch.equal(unpack_signs(packed, K), positive.float() * 2 - 1)
    assert N == 0 or padding_is_zero(packed, K)


@settings(deadline=None)
@given(row=st.lists(st.booleans(), min_size=1, max_size=70))
def test_bits_against_the_definition(row):
    """Bit i of byte j is weight 8j + i, 1 is +1: recomputed with Python's integers."""
    number = sum(1 << k for k, positive in enumerate(row) if positive)
    packed = pack_signs(torch.tensor([row]))
    assert bytes(packed[0].tolist()) == number.to_bytes(packed_width(len(row)), "little")


def test_golden_bytes():
    row = torch.tensor([[1, -1, -1, 1, 1, 1, 1, 1, -1, 1]])
    assert pack_signs(row > 0).tolist() == [[0b11111001, 0b00000010]]
    assert unpack_signs(torch.tensor([[0xF9, 0x02]], dtype=torch.uint8), 10).tolist() == [
        [1, -1, -1, 1, 1, 1, 1, 1, -1, 1]
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_unpacked_dtype(dtype):
    signs = unpack_signs(torch.tensor([[5]], dtype=torch.uint8), 3, dtype)
    assert signs.dtype == dtype and signs.tolist() == [[1, -1, 1]]


def test_pack_refuses_numbers():
    with pytest.raises(TypeError, match=r"expected a bool tensor, found torch\.float32"):
        pack_signs(torch.ones(2, 2))


@pytest.mark.parametrize(
    "packed", [torch.zeros(3, 1, dtype=torch.uint8), torch.zeros(3, 2, dtype=torch.int8)]
)
def test_unpack_refuses_another_width_or_dtype(packed):
    with pytest.raises(FormatError, match=r"expected uint8 \[N, 2\] for K=9"):
        unpack_signs(packed, 9)


def test_padding():
    assert padding_is_zero(torch.tensor([[255, 0b0111]], dtype=torch.uint8), 11)
    assert not padding_is_zero(torch.tensor([[0, 0], [0, 0b1000]], dtype=torch.uint8), 11)
    assert padding_is_zero(torch.tensor([[255]], dtype=torch.uint8), 8)
