import multiprocessing
import os
import signal
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from converters.calibration import Text, sample
from converters.fitting import hessian
from converters.fitting.blocks import BlockModel, run_block
from converters.fitting.folder import FitFolder
from converters.fitting.layer import dense_weight
from converters.fitting.observe import find_groups
from converters.locked import TargetError
from converters.options import Options
from converters.sources import open_source
from tests.converters.models import make_dense
from tests.tiny import VOCAB, random_model

ARCHS = ["llama", "llama-tied", "qwen2", "qwen3", "gemma2", "gemma3", "opt", "phi3"]


@cache
def tokens(windows=8, length=64):
    return torch.randint(0, VOCAB, (windows, length), generator=torch.Generator().manual_seed(0))


def block_model(path: Path, arch: str) -> BlockModel:
    return BlockModel(open_source(make_dense(path / "dense", arch), Options()))


@pytest.mark.parametrize("arch", ARCHS)
def test_blocks_one_by_one_are_the_model(tmp_path, arch):
    blocks = block_model(tmp_path, arch)
    assert arch != "llama" or blocks.model.lm_head.weight.is_meta  # nobody needs it
    hidden, calls = blocks.first_inputs(tokens()[:2])
    with torch.inference_mode():
        for index, kwargs in enumerate(calls):
            hidden = run_block(blocks.load(index), hidden, kwargs)
        seen = []
        model = random_model(arch)
        last = model.get_submodule(blocks.names[-1])
        last.register_forward_hook(lambda _, __, out: seen.append(out))
        model(tokens()[:2])
    found = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    torch.testing.assert_close(hidden, found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arch", "writers"),
    [
        ("llama", {"self_attn.o_proj", "mlp.down_proj"}),
        ("opt", {"self_attn.out_proj", "fc2"}),
        ("gemma2", set()),  # a norm stands behind each output
    ],
)
def test_groups_and_writers_of_the_residual_stream(tmp_path, arch, writers):
    blocks = block_model(tmp_path, arch)
    hidden, calls = blocks.first_inputs(tokens()[:1])
    groups = find_groups(blocks.load(0), list(blocks.linears[0]), hidden, calls[0])
    assert {name for g in groups if g.writes_residual for name in g.names} == writers
    sizes = [len(group.names) for group in groups]
    assert sizes == ([3, 1, 1, 1] if arch == "opt" else [3, 1, 2, 1])


def run_fit(path: Path, name: str, threads=2, resume=False, E=1):
    blocks = BlockModel(open_source(path / "dense", Options()))
    with FitFolder(path / name, {"fit": 1}, resume) as folder:
        return hessian.fit(blocks, tokens(), E, torch.float16, folder, threads=threads)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    make_dense(path / "dense", "llama")
    return path, run_fit(path, "whole")


def test_the_fit_is_far_closer_to_the_model_than_plain_signs(llama):
    path, fitted = llama
    source = open_source(path / "dense", Options())
    dense = random_model("llama")

    def error(tensors_of):
        student = random_model("llama")
        with torch.no_grad():
            for module in source.modules:
                student.get_submodule(module).weight.copy_(dense_weight(tensors_of(module)))
            expected = dense(tokens()).logits
            return float((student(tokens()).logits - expected).norm() / expected.norm())

    plain = error(lambda module: source.layer(module).tensors)
    assert error(lambda module: hessian.layer_of(fitted, module)) < 0.7 * plain


def test_bytes_do_not_depend_on_the_threads(llama):
    path, fitted = llama
    again = run_fit(path, "one-thread", threads=1)
    assert all(torch.equal(fitted[name], again[name]) for name in fitted | again)


def test_a_resumed_fit_gives_the_same_bytes(llama):
    path, fitted = llama
    run_fit(path, "resumed")
    (path / "resumed.fit" / "hessian" / "block-0001.safetensors").unlink()
    again = run_fit(path, "resumed", resume=True)
    assert all(torch.equal(fitted[name], again[name]) for name in fitted | again)


def _fit_and_die(path):
    write = FitFolder.write

    def write_then_die(self, *args):
        write(self, *args)
        os.kill(os.getpid(), signal.SIGKILL)

    FitFolder.write = write_then_die
    run_fit(path, "killed")


def test_a_killed_fit_goes_on(llama):
    path, fitted = llama
    process = multiprocessing.get_context("spawn").Process(target=_fit_and_die, args=(path,))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    done = list((path / "killed.fit" / "hessian").iterdir())
    assert [file.name for file in done] == ["block-0000.safetensors"]
    first = load_file(done[0])
    assert all(torch.equal(first[name], fitted[name]) for name in first)
    with pytest.raises(TargetError, match="--resume"):
        run_fit(path, "killed")
    again = run_fit(path, "killed", resume=True)
    assert all(torch.equal(fitted[name], again[name]) for name in fitted | again)


def test_a_folder_of_another_fit_is_refused(llama):
    path, _ = llama
    with pytest.raises(TargetError, match="other"), FitFolder(path / "whole", {"fit": 2}, True):
        pass


def test_a_folder_that_is_in_use_is_refused(tmp_path):
    with (
        FitFolder(tmp_path / "x", {}, False),
        pytest.raises(TargetError, match="Another process"),
        FitFolder(tmp_path / "x", {}, True),
    ):
        pass


def test_samples_are_seeded_disjoint_and_recorded():
    class Letters:
        bos_token_id = None

        def __call__(self, pieces, **_):
            return type("Encoding", (), {"input_ids": [[ord(c) for c in text] for text in pieces]})

    texts = [Text("a", "a" * 2000), Text("b", "".join(chr(200 + i % 50) for i in range(4000)))]
    one = sample(texts, Letters(), 10, 2, 10, seed=1)
    assert torch.equal(one.train, sample(texts, Letters(), 10, 2, 10, seed=1).train)
    assert not torch.equal(one.train, sample(texts, Letters(), 10, 2, 10, seed=2).train)
    assert (one.train[::2] == ord("a")).all() and (one.train[1::2] >= 200).all()
    assert one.held_out.shape == (2, 10)
    assert one.record["texts"][0]["sha256"] == texts[0].sha256
