"""The portable unpacking, on every word. Its PTX is in ../test_signs.py."""

import pytest
import torch
import triton
import triton.language as tl

from vllm_bmos.kernels.triton.signs import round_to, unpack_pair


@triton.jit
def unpack_all(words, odd_out, even_out, PAIR: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    odd, even = unpack_pair(tl.load(words + at), PAIR, odd_out.dtype.element_ty, False)
    tl.store(odd_out + at, odd)
    tl.store(even_out + at, even)


@triton.jit
def round_all(values, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, round_to(tl.load(values + at), out.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pair", range(8))
def test_all_words(pair, dtype):
    words = torch.arange(-(2**15), 2**15).to(torch.int16)
    odd, even = torch.empty(2, len(words), dtype=dtype)
    unpack_all[(64,)](words, odd, even, pair, 1024)
    bits = words.to(torch.int32)
    assert torch.equal(odd, (2 * (bits >> (2 * pair + 1) & 1) - 1).to(dtype))
    assert torch.equal(even, (2 * (bits >> (2 * pair) & 1)).to(dtype))


def test_bfloat16_rounds_to_nearest_even():
    """The interpreter truncates; `round_to` must stand in for the hardware's rounding."""
    bits = torch.arange(0x3F80_0000, 0x3F80_0000 + 4096 * 53, 53, dtype=torch.int32)
    values = bits.view(torch.float32)
    out = torch.empty(4096, dtype=torch.bfloat16)
    round_all[(1,)](values, out, 4096)
    assert torch.equal(out, values.to(torch.bfloat16))
