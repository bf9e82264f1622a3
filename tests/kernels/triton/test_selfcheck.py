"""The load-time self-check, with kernels that are wrong in known ways, on the CPU."""

from dataclasses import replace

import pytest
import torch

from tests.kernels.triton.layers import config_of
from vllm_bmos.kernels import choose_kernel, kernels
from vllm_bmos.kernels.reference import ReferenceKernel
from vllm_bmos.kernels.triton import TritonKernel, selfcheck
from vllm_bmos.kernels.triton.selfcheck import SELFCHECK_ENV, SelfCheckError, passes

CONFIG = config_of(200, [70, 33], 3)


class SwappedShards(ReferenceKernel):
    def linear(self, x, logits, tensors, bias, shard_sizes):
        swapped = replace(tensors, in_channel_scale=tensors.in_channel_scale.flip(0))
        return super().linear(x, logits, swapped, bias, shard_sizes)


class FlippedBit(ReferenceKernel):
    def prepare(self, tensors, config):
        weight = tensors.weight.clone()
        weight[40, 3] ^= 4
        return replace(tensors, weight=weight)


class NotANumber(ReferenceKernel):
    def linear(self, x, *args):
        return super().linear(x, *args).index_fill(0, torch.tensor([0]), torch.nan)


class WrongOnlyForManyTokens(ReferenceKernel):
    def linear(self, x, *args):
        return super().linear(x, *args) * (1.01 if x.shape[0] > 8 else 1)


class WrongLogits(ReferenceKernel):
    def router_logits(self, x, router_weight, shards):
        return super().router_logits(x, router_weight, shards).flip(-1)


class NoBias(ReferenceKernel):
    def linear(self, x, logits, tensors, bias, shard_sizes):
        return super().linear(x, logits, tensors, None, shard_sizes)


class WrongDtype(ReferenceKernel):
    def linear(self, *args):
        return super().linear(*args).float()


class DoesNotCompile(ReferenceKernel):
    def linear(self, *args):
        raise RuntimeError("no compiler found")


WRONG = [
    SwappedShards, FlippedBit, NotANumber, WrongOnlyForManyTokens, WrongLogits, NoBias, WrongDtype,
    DoesNotCompile,
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_right_kernel_passes(monkeypatch, dtype):
    monkeypatch.setenv(SELFCHECK_ENV, "error")
    assert (
        passes(ReferenceKernel(), replace(CONFIG, dtype=dtype, scale_dtype=dtype), (1, 9)) is None
    )


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_kernel_is_logged_and_passed_over(monkeypatch, caplog, wrong):
    monkeypatch.delenv(SELFCHECK_ENV, raising=False)
    reason = passes(wrong(), CONFIG, (1, 9))
    assert reason is not None and reason.startswith("self-check failed: ")
    (record,) = caplog.records
    assert (
        record.levelname == "ERROR" and "K=200" in record.message and reason[20:] in record.message
    )


def test_the_reason_names_the_place_and_both_values():
    reason = passes(NotANumber(), CONFIG, (1, 9))
    assert "M=1" in reason and "at [0, 0]" in reason and "found nan" in reason
    assert "M=9" in passes(WrongOnlyForManyTokens(), CONFIG, (1, 9))


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_kernel_is_an_error_if_wanted(monkeypatch, wrong):
    monkeypatch.setenv(SELFCHECK_ENV, "error")
    with pytest.raises(RuntimeError if wrong is DoesNotCompile else SelfCheckError):
        passes(wrong(), CONFIG, (1, 9))


def test_off_and_unknown_modes(monkeypatch, caplog):
    monkeypatch.setenv(SELFCHECK_ENV, "off")
    assert passes(FlippedBit(), CONFIG, (1,)) is None
    assert "not checked" in caplog.text
    monkeypatch.setenv(SELFCHECK_ENV, "of")
    with pytest.raises(ValueError, match="fallback, error, off"):
        passes(FlippedBit(), CONFIG, (1,))


def test_the_check_runs_once_a_shape(monkeypatch):
    calls = []

    class Counting(ReferenceKernel):
        def prepare(self, tensors, config):
            calls.append(config)
            return tensors

    kernel = Counting()
    for config in (CONFIG, CONFIG, replace(CONFIG, K=208)):
        assert passes(kernel, config, (1,)) is None
    assert [config.K for config in calls] == [200, 208]


def test_a_gpu_where_triton_is_wrong_gets_the_dequantising_kernel(monkeypatch):
    """The whole choice on a pretended GPU whose Triton gives wrong numbers."""
    monkeypatch.setattr("vllm_bmos.kernels.triton.fits", lambda config: (True, "pretended"))
    monkeypatch.setattr("vllm_bmos.kernels.triton._tokens_to_try", lambda device: (1,))
    monkeypatch.setattr(selfcheck, "_mismatches", lambda *args: iter(["M=1: all wrong"]))
    config = replace(CONFIG, device="cuda", K=216)
    assert choose_kernel(config).name == "dequant"
    monkeypatch.setenv("VLLM_BMOS_KERNEL", "triton")
    with pytest.raises(ValueError, match="M=1: all wrong"):
        choose_kernel(config)
    monkeypatch.setattr(selfcheck, "_mismatches", lambda *args: iter([]))
    assert choose_kernel(replace(config, K=224)).name == "triton"
    assert isinstance(kernels()["triton"], TritonKernel)
