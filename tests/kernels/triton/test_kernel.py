"""When the Triton kernel says yes, and why not: it never raises for what a machine lacks."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from tests.kernels.triton.layers import config_of
from vllm_bmos.kernels import choose_kernel
from vllm_bmos.kernels.triton import TritonKernel, fits, launch

GPU = config_of(4096, [4096], device="cuda")


@pytest.fixture
def capability(monkeypatch):
    def use(major, minor):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (major, minor))

    return use


@pytest.mark.parametrize("arch", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_fits_ampere_and_later(capability, arch):
    capability(*arch)
    assert fits(GPU) == (True, f"compute capability {arch[0]}.{arch[1]}")
    assert fits(replace(GPU, dtype=torch.bfloat16, E=3, K=77, shard_sizes=(1, 5)))[0]


@pytest.mark.parametrize("arch", [(7, 0), (7, 5)])
def test_older_gpus_get_the_dequantising_kernel(capability, arch):
    capability(*arch)
    able, reason = fits(GPU)
    assert not able and "8.0" in reason and f"{arch[0]}.{arch[1]}" in reason
    assert choose_kernel(GPU).name == "dequant"


def test_float32_activations_get_the_dequantising_kernel(capability):
    capability(8, 6)
    able, reason = fits(replace(GPU, dtype=torch.float32))
    assert not able and "float32" in reason
    assert choose_kernel(replace(GPU, dtype=torch.float32)).name == "dequant"


def test_cpu_amd_and_no_triton(monkeypatch, capability):
    capability(9, 0)
    assert TritonKernel().can_run(config_of(64, [64])) == (
        False,
        "needs an NVIDIA GPU, the layer is on cpu",
    )
    monkeypatch.setattr("vllm_bmos.kernels.triton.find_spec", lambda name: None)
    able, reason = TritonKernel().can_run(GPU)
    assert not able and "not installed" in reason
    monkeypatch.setattr(torch.version, "hip", "6.4")
    able, reason = TritonKernel().can_run(GPU)
    assert not able and "AMD" in reason


def test_importing_needs_no_triton_and_no_gpu():
    """The kernels' module imports where Triton does not, and leaves CUDA alone."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "def refuse(*a, **k): raise AssertionError('CUDA was initialised')\n"
        "torch.cuda._lazy_init = refuse\n"
        "from vllm_bmos.kernels import kernels, choose_kernel, LinearConfig\n"
        "c = LinearConfig(64, (64,), 4, torch.float32, torch.float32, 'cpu')\n"
        "print(list(kernels())[0], choose_kernel(c).name)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("triton ")


def test_every_variant_is_tried_before_serving(capability):
    """The self-check's numbers of tokens reach every tile, the vendor GEMM and both routers."""
    from vllm_bmos.kernels.triton import _tokens_to_try
    from vllm_bmos.kernels.triton.configs import tile_for, tiles_for

    for arch in ((8, 6), (9, 0), (10, 0)):
        capability(*arch)
        _tokens_to_try.cache_clear()
        tried = _tokens_to_try("cuda")
        number = arch[0] * 10 + arch[1]
        assert {tile_for(number, M) for M in tried} == {*tiles_for(number), None}
        assert min(tried) == 1 and max(tried) > launch.FEW_TOKENS
    _tokens_to_try.cache_clear()
