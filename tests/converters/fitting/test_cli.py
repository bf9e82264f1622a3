import json
import shutil

import pytest
import torch

from converters.fitting import block, distill
from converters.hf_to_bmos import main
from tests.converters.models import make_dense
from tests.tiny import add_tokenizer
from vllm_bmos.checkpoint.format import IN_SCALE
from vllm_bmos.checkpoint.reader import Checkpoint

STAGES = {
    "hessian": ["hessian"],
    "block": ["hessian", "block"],
    "kd-scales": ["hessian", "kd-scales"],
    "experts": ["hessian", "qat", "experts"],
}


@pytest.fixture
def source(tmp_path):
    path = make_dense(tmp_path / "dense")
    add_tokenizer(path)
    lines = [{"text": f"line {i}: the quick brown fox jumps over it"} for i in range(400)]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return path


def convert(source, name, *flags):
    text = str(source.parent / "text.jsonl")
    size: tuple[str, ...] = ("--length", "64", "--experts", "2")
    trains = {"kd-scales", "qat", "experts"} & set(flags)
    size += ("--tokens", "512") if trains else ()
    size += () if trains and "--start-from" in flags else ("--windows", "8")
    target = source.parent / name
    return target, main([str(source), str(target), "--calibration", text, *size, *flags])


def pack(source, name, *flags):
    """By the data-free stage."""
    target = source.parent / name
    return target, main([str(source), str(target), *flags])


@pytest.mark.parametrize("stage", STAGES)
def test_a_fit_from_the_command_line(source, stage, capsys):
    target, code = convert(source, "packed", "--stage", stage)
    assert code == 0
    config = Checkpoint(target).config
    assert config.provenance["stage"] == stage and config.provenance["stages"] == STAGES[stage]
    record = config.provenance["calibration"]
    assert record["texts"][0]["name"] == "text.jsonl" and record["windows"] == 8
    assert config.num_experts == 2
    assert not target.with_name("packed.fit").exists()
    assert "garbage" not in (target / "README.md").read_text()
    assert main(["verify", str(target), "--source", str(source)]) == 0
    assert f"were fitted by stage '{stage}'" in capsys.readouterr().out


@pytest.mark.parametrize(("stage", "module"), [("block", block), ("qat", distill)])
def test_lengths_batch_and_rates_reach_the_stage(source, monkeypatch, stage, module):
    seen, fit = [], module.fit

    def watched(*args, **kwargs):
        seen.extend(a for a in args if isinstance(a, (block.BlockOptions, distill.DistillOptions)))
        return fit(*args, **kwargs)

    monkeypatch.setattr(module, "fit", watched)
    flags = ["--batch", "3", "--latent-lr", "0.07", "--scale-lr", "0.003", "--seed", "7"]
    flags += ["--train-length", "16"]
    flags += ["--epochs", "1"] if stage == "block" else ["--hidden", "0.5"]
    target, code = convert(source, "packed", "--stage", stage, *flags)
    assert code == 0
    assert [(o.length, o.batch, o.latent_lr, o.scale_lr) for o in seen] == [(16, 3, 0.07, 0.003)]
    assert [o.epochs if stage == "block" else o.hidden for o in seen] == [
        1 if stage == "block" else 0.5
    ]
    assert Checkpoint(target).config.provenance["calibration"]["seed"] == 7


@pytest.mark.parametrize("begins", [False, True])
def test_window_sizes_and_checkpoints_reach_the_training(source, monkeypatch, begins):
    add_tokenizer(source, begins)
    seen, fit = [], distill.fit

    def watched(dense, start, train, held_out, folder, options, *rest):
        seen.append((tuple(train.shape), tuple(held_out.shape), options.save_steps))
        for windows in (train, held_out):
            assert ((windows == 1).nonzero()[:, 1] == 0).all()  # BOS is nowhere else
            assert (windows[:, 0] == 1).all() == begins
        return fit(dense, start, train, held_out, folder, options, *rest)

    monkeypatch.setattr(distill, "fit", watched)
    flags = ("--train-length", "32", "--held-out", "3", "--save-steps", "7")
    assert convert(source, "packed", "--stage", "kd-scales", *flags)[1] == 0
    assert seen == [((16, 32), (3, 64), 7)]


def test_stage_block_cuts_windows_of_training_and_no_others(source, monkeypatch):
    seen, fit = [], block.fit

    def watched(model, start, train, held_out, *rest):
        seen.append((tuple(train.shape), tuple(held_out.shape)))
        return fit(model, start, train, held_out, *rest)

    monkeypatch.setattr(block, "fit", watched)
    for name, *flags in (("one", "--train-length", "16"), ("two",)):  # 256 do not fit in 64
        assert convert(source, name, "--stage", "block", "--held-out", "3", *flags)[1] == 0
    assert seen == [((32, 16), (3, 64)), ((8, 64), (3, 64))]


def test_too_small_a_disk_is_found_before_the_fit(source, monkeypatch, capsys):
    usage = shutil.disk_usage(source)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    _, code = convert(source, "new/packed", "--stage", "hessian")
    assert code == 3 and "the result needs" in capsys.readouterr().err
    assert sorted(path.name for path in source.parent.iterdir()) == ["dense", "text.jsonl"]


def test_a_finished_fit_is_not_repeated(source):
    target, _ = convert(source, "packed", "--stage", "hessian")
    before = (target / "model.safetensors").stat().st_ino
    assert convert(source, "packed", "--stage", "hessian", "--resume")[1] == 0
    assert (target / "model.safetensors").stat().st_ino == before
    assert convert(source, "packed", "--stage", "hessian")[1] == 3  # it exists


def test_a_fit_differs_from_plain_signs(source):
    fitted, _ = convert(source, "fitted", "--stage", "hessian")
    plain, _ = pack(source, "plain")
    name = f"{Checkpoint(fitted).config.modules[0]}.{IN_SCALE}"
    assert not torch.equal(Checkpoint(fitted).tensor(name), Checkpoint(plain).tensor(name))


def test_a_stage_starts_from_a_packed_checkpoint(source, capsys):
    first, _ = pack(source, "first", "--experts", "1")
    target, code = convert(source, "second", "--stage", "block", "--start-from", str(first))
    assert code == 0
    record = Checkpoint(target).config.provenance
    assert record["stages"] == ["svid", "block"] and record["start_from"]["name"] == "first"
    assert record["trained_tokens"] == 0
    more = ("--tokens", "700")  # five steps of 128 tokens
    third, code = convert(
        source, "third", "--stage", "qat", "--start-from", str(target), "--resume", *more
    )
    assert code == 0
    again, code = convert(source, "again", "--stage", "qat", "--start-from", str(third))
    record = Checkpoint(again).config.provenance
    assert record["trained_tokens"] == 5 * 128 + 512 and record["processes"] == 1
    chain = record["start_from"]["start_from"]
    assert chain["stages"] == ["svid", "block"] and chain["calibration"]["texts"]
    make_dense(source.parent / "other", "llama-mqa")
    other, _ = pack(source.parent / "other", "packed-other")
    assert convert(source, "fourth", "--stage", "qat", "--start-from", str(other))[1] == 1
    assert "its layers are not those of" in capsys.readouterr().err


def test_a_training_that_did_not_help_is_recorded(source, monkeypatch, capsys):
    losses = iter([1.0, 2.0] * 3)
    monkeypatch.setattr(distill, "held_out_loss", lambda *_: next(losses))
    first, _ = pack(source, "first", "--experts", "2")
    for target, flags in (
        ("garbage", ("--stage", "kd-scales", "--start-from", str(first))),
        ("usable", ("--stage", "kd-scales")),
    ):
        target, code = convert(source, target, *flags)
        assert code == 0
        config, card = Checkpoint(target).config, (target / "README.md").read_text()
        assert config.provenance["discarded"] == ["kd-scales"]
        assert "| without effect | kd-scales: the loss on held-out text did not fall |" in card
        assert ("garbage" in card) == (target.name == "garbage")
    first = source.parent / "garbage"
    target, code = convert(source, "both", "--stage", "qat", "--start-from", str(first))
    assert code == 0
    assert Checkpoint(target).config.provenance["discarded"] == ["kd-scales", "qat"]
    (source.parent / "eval.txt").write_text("the quick brown fox")
    more = ("--resume", "--eval-text", str(source.parent / "eval.txt"))
    assert convert(source, "both", "--stage", "qat", "--start-from", str(first), *more)[1] == 0
    card = (target / "README.md").read_text()
    assert "garbage" in card and "| without effect | kd-scales, qat: " in card
    assert main(["verify", str(target), "--source", str(source)]) == 0


def test_too_few_tokens_for_a_step_are_refused_before_any_work(source, capsys, monkeypatch):
    monkeypatch.setattr("converters.fitting.run.Fit.run", lambda *_: pytest.fail("fitted"))
    assert convert(source, "packed", "--stage", "qat", "--batch", "9")[1] == 1
    assert "--tokens 512: one step takes 576, 9 windows of 64" in capsys.readouterr().err


def test_a_dry_run_plans_the_fit_and_writes_nothing(source, capsys):
    target, code = convert(source, "dry", "--stage", "hessian", "--dry-run")
    assert code == 0 and "stage       hessian, E = 2" in capsys.readouterr().out
    assert not target.exists() and not target.with_name("dry.fit").exists()
    code = convert(source, "dry", "--stage", "hessian", "--dry-run", "--calibration", "self:9999")[
        1
    ]
    assert code == 0  # the model has written nothing
    packed, _ = pack(source, "packed")
    assert convert(packed, "dry", "--stage", "hessian", "--dry-run")[1] == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--calibration", "x.txt"], "--calibration: --stage svid fits nothing"),
        (["--start-from=x"], "--start-from: --stage svid fits nothing"),
        (["--layers", "x", "--tokens", "9", "--experts", "2"], "--experts, --tokens: the file"),
        (["--stage", "qat", "--train-length", "2048"], "windows of --length 1024 are cut to it"),
        (["--stage", "qat", "--calib", "x"], "--calib"),
        (["--stage", "hessian", "--tokens", "9"], "--tokens: unused by --stage hessian"),
        (["--stage", "hessian", "--start-from", "x"], "starts from the dense weights"),
        (["--stage", "qat", "--epochs", "2"], "--epochs: unused by --stage qat"),
        (["--stage", "qat", "--start-from", "x", "--windows", "9"], "--windows: unused"),
        (["--stage", "kd-scales", "--latent-lr", "1"], "--latent-lr: unused"),
    ],
)
def test_a_flag_that_would_be_ignored_is_refused(source, capsys, flags, message):
    with pytest.raises(SystemExit) as exit:
        pack(source, "packed", *flags)
    assert exit.value.code == 2 and message in capsys.readouterr().err


def test_an_interrupted_fit_on_other_windows_is_refused(source, monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(distill, "fit", stop)
        assert convert(source, "packed", "--stage", "qat", "--tokens", "4096")[1] == 130
    for flags in (("--windows", "7"), ("--held-out", "3")):
        again = ("--stage", "qat", "--tokens", "4096", "--resume", *flags)
        assert convert(source, "packed", *again)[1] == 3
        assert "with other options" in capsys.readouterr().err.replace("\n", " ")


def test_a_text_that_cannot_be_measured_on_is_named_before_the_fit(source, capsys, monkeypatch):
    monkeypatch.setattr("converters.fitting.run.Fit.run", lambda *_: pytest.fail("fitted"))
    (source.parent / "latin.txt").write_bytes("ein Text mit \xe4".encode("latin-1"))
    (source.parent / "short.txt").write_text(" \n")
    for name, message in (
        ("none.txt", "No such file"),
        ("latin.txt", "utf-8"),
        ("short.txt", "expected text, found 2 characters"),
    ):
        text = str(source.parent / name)
        assert convert(source, "packed", "--stage", "hessian", "--eval-text", text)[1] == 1
        printed = capsys.readouterr().err
        assert name in printed and message in printed


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ('{"txt": 1}', 'line 1: expected a JSON object with a string "text"'),
        ('{"text": "a"}\n\n{"text": 5}', "line 3"),
        ('{"text": "x"}', "fewer"),
    ],
)
def test_bad_text_is_named(source, capsys, content, message):
    text = source.parent / "bad.jsonl"
    if content is not None:
        text.write_text(content)
    target = source.parent / "packed"
    arguments = [str(source), str(target), "--stage", "hessian", "--calibration", str(text)]
    assert main(arguments) == 1
    printed = capsys.readouterr().err
    assert "bad.jsonl" in printed and message in printed
    assert not target.exists()
