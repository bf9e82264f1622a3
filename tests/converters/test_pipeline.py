"""Converting: atomic, resumable, deterministic, and careful with what is already there."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from converters import pipeline
from converters.locked import TargetError
from converters.options import Options
from converters.pipeline import convert
from converters.plan import make_plan
from converters.sources.official import OfficialSource
from converters.workspace import Workspace
from tests.converters.models import make_dense, make_official
from vllm_bmos.checkpoint import FormatError
from vllm_bmos.checkpoint.verify import verify

ROOT = Path(__file__).parent.parent.parent


def content(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.fixture
def source(tmp_path):
    return make_official(tmp_path / "source")


@pytest.fixture
def wanted(tmp_path, source):
    convert(make_plan(source, Options()), tmp_path / "wanted")
    return content(tmp_path / "wanted")


def break_after(monkeypatch, jobs, error):
    """Raise `error` in the job after the first `jobs`."""
    layer, done = OfficialSource.layer, []

    def breaking(self, module):
        if len(done) == jobs:
            raise error
        done.append(module)
        return layer(self, module)

    monkeypatch.setattr(OfficialSource, "layer", breaking)
    return done


@pytest.mark.parametrize("make", [make_official, make_dense])
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_bytes_do_not_depend_on_the_number_of_threads(tmp_path, make, workers):
    source = make(tmp_path / "source")
    for name, count in (("a", 1), ("b", workers)):
        convert(make_plan(source, Options()), tmp_path / name, workers=count)
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_max_shard_size(tmp_path, source, wanted):
    convert(make_plan(source, Options(max_shard_size=9000)), tmp_path / "target")
    verify(tmp_path / "target")
    shards = sorted((tmp_path / "target").glob("model-*.safetensors"))
    assert len(shards) > 3
    assert all(sum(t.nbytes for t in load_file(s).values()) <= 9000 for s in shards)
    (tmp_path / "one.safetensors").write_bytes(wanted["model.safetensors"])
    whole = load_file(tmp_path / "one.safetensors")
    assert {n for s in shards for n in load_file(s)} == whole.keys()


def test_nothing_but_the_target_is_left(tmp_path, source):
    convert(make_plan(source, Options()), tmp_path / "deep/er/target")
    assert os.listdir(tmp_path / "deep/er") == ["target"]
    assert not [name for name in os.listdir(tmp_path / "deep/er/target") if "tmp" in name]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("no space left")])
def test_an_interrupted_run_is_resumed_to_the_same_bytes(
    tmp_path, source, wanted, monkeypatch, error
):
    target = tmp_path / "target"
    with monkeypatch.context() as patch:
        break_after(patch, 5, error)
        with pytest.raises(type(error)):
            convert(make_plan(source, Options()), target, workers=1)
    assert not target.exists() and (tmp_path / "target.partial").is_dir()
    with pytest.raises(TargetError, match="--resume"):
        convert(make_plan(source, Options()), target)
    done = break_after(monkeypatch, 99, error)
    convert(make_plan(source, Options()), target, resume=True)
    assert len(done) == 14 - 5  # five layers were not converted again
    assert content(target) == wanted
    assert not (tmp_path / "target.partial").exists()


def test_damage_to_the_partial_result_is_repaired(tmp_path, source, wanted, monkeypatch):
    with monkeypatch.context() as patch:
        break_after(patch, 9, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            convert(make_plan(source, Options()), tmp_path / "target", workers=1)
    partial = tmp_path / "target.partial"
    data = partial / "checkpoint/model.safetensors"
    data.write_bytes(data.read_bytes()[:1500] + bytes(data.stat().st_size - 1500))
    journal = partial / "journal.jsonl"
    journal.write_text(journal.read_text()[:-20])  # a line cut short
    convert(make_plan(source, Options()), tmp_path / "target", resume=True)
    assert content(tmp_path / "target") == wanted


@pytest.mark.parametrize("change", ["source", "options"])
def test_resume_of_something_else_is_refused(tmp_path, source, monkeypatch, change):
    with monkeypatch.context() as patch:
        break_after(patch, 5, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            convert(make_plan(source, Options()), tmp_path / "target", workers=1)
    options = Options()
    if change == "source":
        tensors = load_file(source / "model.safetensors")
        tensors["model.norm.weight"] += 1
        save_file(tensors, source / "model.safetensors")
    else:
        options = Options(scale_dtype="float32")
    before = content(tmp_path / "target.partial/checkpoint")
    with pytest.raises(TargetError, match="another source or with other options"):
        convert(make_plan(source, options), tmp_path / "target", resume=True)
    assert content(tmp_path / "target.partial/checkpoint") == before


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("done", [False, True])
def test_a_directory_of_something_else_is_left_alone(tmp_path, source, wanted, resume, done):
    """Its name is the one that the converter works in."""
    mine = tmp_path / "target.partial"
    if done:
        convert(make_plan(source, Options()), tmp_path / "target")
    mine.mkdir()
    (mine / "mine.txt").write_text("mine")
    if done and resume:
        convert(make_plan(source, Options()), tmp_path / "target", resume=True)
    else:
        message = (
            "exists already" if done else "holds mine.txt, which the converter has not written"
        )
        with pytest.raises(TargetError, match=message):
            convert(make_plan(source, Options()), tmp_path / "target", resume=resume)
    assert content(mine) == {"mine.txt": b"mine"}


def test_a_kill_while_a_work_folder_is_deleted_leaves_one_of_its_kind(
    tmp_path, source, wanted, monkeypatch
):
    rmtree = shutil.rmtree

    def killed(path, **options):
        rmtree(path, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        break_after(patch, 0, FormatError("bad"))
        patch.setattr("converters.locked.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            convert(make_plan(source, Options()), tmp_path / "target", workers=1)
    assert (tmp_path / "target.partial").is_dir()
    convert(make_plan(source, Options()), tmp_path / "target", resume=True)
    assert content(tmp_path / "target") == wanted


@pytest.mark.parametrize("name", ["target.partial", "target.fit"])
def test_the_source_may_not_lie_where_the_converter_works(tmp_path, name):
    source = make_official(tmp_path / name / "source")
    before = content(source)
    with pytest.raises(TargetError, match="where the converter works"):
        convert(make_plan(source, Options()), tmp_path / "target", resume=True)
    assert content(source) == before


def test_resume_when_there_is_nothing_to_resume(tmp_path, source, wanted):
    convert(make_plan(source, Options()), tmp_path / "target", resume=True)
    assert content(tmp_path / "target") == wanted


def test_resume_of_a_finished_run_is_done_already(tmp_path, source, wanted):
    """A run that was killed between its last rename and its exit must not fail for ever."""
    target = tmp_path / "target"
    convert(make_plan(source, Options()), target)
    (tmp_path / "target.partial").mkdir()
    (tmp_path / "target.partial/journal.jsonl").write_text("{}")
    convert(make_plan(source, Options()), target, resume=True)
    assert content(target) == wanted and not (tmp_path / "target.partial").exists()
    with pytest.raises(TargetError, match="exists already"):
        convert(make_plan(source, Options(scale_dtype="float32")), target, resume=True)


def test_a_bad_source_leaves_nothing_behind(tmp_path, source, monkeypatch):
    break_after(monkeypatch, 5, FormatError("the source is damaged"))
    with pytest.raises(FormatError, match="damaged"):
        convert(make_plan(source, Options()), tmp_path / "target", workers=1)
    assert sorted(os.listdir(tmp_path)) == ["source"]


def test_an_error_before_the_first_layer_leaves_nothing_behind(tmp_path, source, monkeypatch):
    def full(*args):
        raise OSError(28, "full")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="full"):
        convert(make_plan(source, Options()), tmp_path / "target")
    assert sorted(os.listdir(tmp_path)) == ["source"]


def test_too_small_a_disk_is_found_first(tmp_path, source, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(TargetError, match=r"the result needs .* GB, the file system has"):
        convert(make_plan(source, Options()), tmp_path / "target")
    assert sorted(os.listdir(tmp_path)) == ["source"]


def test_targets_that_exist(tmp_path, source, wanted):
    plan = make_plan(source, Options())
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name, message in (
        ("file", "exists already"),
        ("full", "exists already"),
        ("link", "is a link, which the result cannot replace"),
        ("dangling", "is a link, which the result cannot replace"),
    ):
        with pytest.raises(TargetError, match=message):
            convert(plan, tmp_path / name)
        assert not (tmp_path / f"{name}.partial").exists()
    assert (tmp_path / "file").read_text() == (tmp_path / "full/mine").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    convert(plan, tmp_path / "empty")
    assert content(tmp_path / "empty") == wanted


def test_the_target_may_not_be_the_source(tmp_path, source):
    before = content(source)
    for target in (source, source / "inner", tmp_path / "other/../source"):
        with pytest.raises(TargetError, match="lies inside the source"):
            convert(make_plan(source, Options()), target)
    assert content(source) == before


def test_two_converters_on_one_target(tmp_path, source, wanted):
    with (
        Workspace(tmp_path / "target", "fingerprint", resume=False),
        pytest.raises(TargetError, match="Another process is working in"),
    ):
        convert(make_plan(source, Options()), tmp_path / "target")
    convert(make_plan(source, Options()), tmp_path / "target")
    assert content(tmp_path / "target") == wanted


def test_a_result_that_does_not_verify_is_never_published(tmp_path, source, monkeypatch):
    write_json = pipeline.write_json

    def damaging(path, value):
        data = path.with_name("model.safetensors")
        damaged = bytearray(data.read_bytes())
        damaged[-1] ^= 1
        data.write_bytes(damaged)
        write_json(path, value)

    monkeypatch.setattr(pipeline, "write_json", damaging)
    with pytest.raises(FormatError, match="do not have the sha256"):
        convert(make_plan(source, Options()), tmp_path / "target")
    assert not (tmp_path / "target").exists()


JOBS = 8 * (7 + 2) + 3  # layers and norms of eight blocks; embeddings, last norm, head


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A source that takes a while, and what it becomes."""
    path = tmp_path_factory.mktemp("small")
    source = make_official(path / "source", "small")
    convert(make_plan(source, Options()), path / "wanted")
    return source, content(path / "wanted")


@pytest.mark.parametrize(
    ("moment", "sign", "code"),
    [
        (0.1, signal.SIGKILL, -signal.SIGKILL),
        (0.9, signal.SIGKILL, -signal.SIGKILL),
        # Early, since Python handles this signal a little later and little work may be left then.
        (0.05, signal.SIGINT, 130),
    ],
)
def test_killed_and_resumed(tmp_path, small, moment, sign, code):
    """A signal while layers are written; then --resume to the bytes of an undisturbed run."""
    source, wanted = small
    target = tmp_path / "target"
    command = [sys.executable, str(ROOT / "converters/hf_to_bmos.py"), str(source), str(target)]
    journal = tmp_path / "target.partial/journal.jsonl"

    def interrupted():
        """The exit status of a run that got the signal, unless it ended before."""
        process = subprocess.Popen(
            [*command, "--jobs", "1"],
            stderr=subprocess.DEVNULL,
            # A background job of a shell inherits SIGINT ignored, and would not be interrupted.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            deadline = time.monotonic() + 300
            while process.poll() is None and time.monotonic() < deadline:
                if journal.exists() and journal.read_text().count("\n") > moment * JOBS:
                    process.send_signal(sign)
                    break
                time.sleep(0.0005)
            return process.wait(300)
        finally:
            process.kill()

    for _ in range(5):
        found = interrupted()
        if found != 0:  # else this test was too slow
            break
        shutil.rmtree(target)
    assert found == code
    assert not target.exists()
    subprocess.run([*command, "--resume"], check=True, capture_output=True)
    assert content(target) == wanted
