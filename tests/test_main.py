"""`python -m vllm_bmos` explains what cannot run; it never ends in a traceback itself."""

import os
import subprocess
import sys

import pytest


def report(**environment: str) -> str:
    command = [sys.executable, "-m", "vllm_bmos"]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_every_kernel_says_whether_it_runs_and_why() -> None:
    lines = report().splitlines()
    assert lines[0].startswith("vllm-bmos ")
    kernels = [line.split() for line in lines if line.lstrip()[:2] in ("+ ", "- ")]
    assert {words[1] for words in kernels} == {"cpu", "dequant", "reference", "triton"}
    assert all(len(words) > 2 for words in kernels)


@pytest.mark.parametrize(
    ("variable", "value", "why"),
    [
        ("VLLM_BMOS_CPU_MODE", "fastest", "unknown mode"),
        ("VLLM_BMOS_CPU_ISA", "mmx", "this machine and build have"),
        ("VLLM_BMOS_KERNEL", "cuda", "cuda"),
    ],
)
def test_a_variable_that_names_nothing_is_explained(variable: str, value: str, why: str) -> None:
    text = report(**{variable: value})
    assert f"{variable}={value}" in text and why in text
