"""What `register` tells vLLM besides the quantization method."""

import os

import pytest
from vllm import envs
from vllm.platforms import current_platform

from vllm_bmos.kernels import ENVIRONMENT, KERNEL_ENV
from vllm_bmos.plugin import register


def test_vllm_knows_our_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    register()
    # vLLM 0.28 has it in envs.
    validate = getattr(envs, "validate_environ", None) or current_platform.validate_environ
    for name in [name for name in os.environ if name.startswith("VLLM_")]:
        monkeypatch.delenv(name)
    for name in ENVIRONMENT:
        monkeypatch.setenv(name, "x")
    validate(hard_fail=True)
    monkeypatch.setenv("VLLM_BMOS_KERNAL", "cpu")
    with pytest.raises(ValueError, match="VLLM_BMOS_KERNAL"):
        validate(hard_fail=True)


def test_compiled_graphs_depend_on_the_forced_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    register()
    monkeypatch.delenv(KERNEL_ENV, raising=False)
    free = envs.compile_factors()
    monkeypatch.setenv(KERNEL_ENV, "dequant")
    assert envs.compile_factors()[KERNEL_ENV] == "dequant" != free[KERNEL_ENV]
