"""The CPU library's product with dense weights, on every instruction set of this machine."""

import pytest
import torch

from tests.kernels.test_cpu import BF16, F16, F32, isa  # noqa: F401 (a fixture)
from vllm_bmos.kernels import cpu

I8 = torch.int8
# N, K: a router's few rows, whose tokens are divided among threads; many rows, which are; and odd
# ends of blocks of 8 rows, 64 columns and 512 of a chunk.
SHAPES = [(1, 1), (4, 100), (9, 513), (129, 64), (700, 1537), (1024, 576)]


def weights(N: int, K: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(N + K)
    if dtype == I8:
        return torch.randint(-127, 128, (N, K), generator=generator, dtype=I8)
    return torch.randn(N, K, generator=generator).to(dtype)


def tokens(M: int, K: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(M, K, generator=torch.Generator().manual_seed(M)).to(dtype)


@pytest.mark.parametrize(("N", "K"), SHAPES)
@pytest.mark.parametrize("weight_dtype", [I8, BF16, F16, F32])
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_it_is_the_product(
    isa: str,  # noqa: F811
    N: int,
    K: int,
    weight_dtype: torch.dtype,
    dtype: torch.dtype,
) -> None:
    weight = weights(N, K, weight_dtype)
    for M in (0, 1, 3, 4, 21):
        x = tokens(M, K, dtype)
        y = cpu.dense(x, weight)
        size = x.double().norm(dim=1, keepdim=True) * weight.double().norm(dim=1)
        assert y.dtype == F32 and y.shape == (M, N)
        assert ((y.double() - x.double() @ weight.double().T).abs() <= 2e-7 * size).all()


@pytest.mark.parametrize("weight_dtype", [I8, BF16, F16, F32])
def test_one_hot_tokens_read_the_weights(
    isa: str,  # noqa: F811
    weight_dtype: torch.dtype,
) -> None:
    weight = weights(300, 130, weight_dtype)
    assert torch.equal(cpu.dense(torch.eye(130), weight), weight.float().T)


def test_a_row_has_the_same_bits_in_every_batch_on_any_threads_and_instruction_set() -> None:
    x, weight = tokens(21, 1537, BF16), weights(700, 1537, I8)
    expected = cpu.dense(x, weight)
    before, threads = cpu.isa(), torch.get_num_threads()
    try:
        for name in cpu.isas():
            cpu.library().bmos_use_isa(name.encode())
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                assert torch.equal(cpu.dense(x, weight), expected)
                for rows in (slice(5, 6), slice(2, 5), slice(3, 20)):
                    assert torch.equal(cpu.dense(x[rows], weight), expected[rows])
            # Of few rows the tokens are divided.
            assert torch.equal(cpu.dense(x, weight[3:8]), expected[:, 3:8])
    finally:
        torch.set_num_threads(threads)
        cpu.library().bmos_use_isa(before.encode())


def test_tensors_need_not_be_contiguous() -> None:
    x, weight = tokens(6, 200, BF16), weights(90, 200, F16)
    expected = cpu.dense(x[:, ::2].contiguous(), weight[:, 100:].contiguous())
    assert torch.equal(cpu.dense(x[:, ::2], weight[:, 100:]), expected)


def test_other_widths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"weights of 100 inputs for x, found \(9, 99\)"):
        cpu.dense(torch.zeros(2, 100), torch.zeros(9, 99))
