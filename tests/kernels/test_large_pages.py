"""Prepared layers lie on cache lines, apart from each other, in few areas."""

import mmap

import pytest
import torch

from vllm_bmos.kernels import large_pages


def test_tensors_are_apart_and_on_cache_lines() -> None:
    shapes = [
        ((3, 5), torch.float16),
        ((1,), torch.uint8),
        ((0, 4), torch.float32),
        ((7,), torch.int64),
    ]
    tensors = [large_pages.empty(shape, dtype) for shape, dtype in shapes * 20]
    for number, (tensor, (shape, dtype)) in enumerate(zip(tensors, shapes * 20, strict=True)):
        assert tuple(tensor.shape) == shape and tensor.dtype == dtype
        assert tensor.data_ptr() % 64 == 0 or tensor.numel() == 0
        tensor.fill_(number % 100)
    for number, tensor in enumerate(tensors):
        assert bool((tensor == number % 100).all())


def test_an_area_is_aligned_and_larger_tensors_have_their_own() -> None:
    large = large_pages.empty((large_pages.AREA + 1,), torch.uint8)
    assert large.data_ptr() % large_pages.PAGE == 0
    large[-1] = 1
    assert large_pages.empty((8,), torch.uint8).data_ptr() % 64 == 0


def test_a_system_without_large_pages_gives_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(mmap.mmap):
        def madvise(self, *_: int) -> None:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(large_pages.mmap, "mmap", Refusing)
    tensor = large_pages.empty((large_pages.AREA + 1,), torch.uint8)
    tensor[-1] = 7
    assert int(tensor[-1]) == 7
