"""What `--help` says is so."""

import pytest

from converters.arguments import BAD_INPUT, COMMANDS, INTERRUPTED, parse
from converters.fitting.block import BlockOptions
from converters.fitting.margins import latent_rate
from converters.fitting.training import DistillOptions


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        parse(["convert", "--help"], dict.fromkeys(COMMANDS, lambda _: 0))
    return " ".join(capsys.readouterr().out.split())


def test_defaults_that_depend_on_the_stage(said: str) -> None:
    distill, block = DistillOptions(), BlockOptions()
    assert distill.scale_lr == block.scale_lr and distill.latent_lr is block.latent_lr is None
    for flag, wanted in {
        "--batch": f"{distill.batch} if not given, in stage block {block.batch}",
        "--train-length": f"{distill.length} if not given, in stage block {block.length}",
        "--save-steps": f"{distill.save_steps} if not given",
        "--latent-lr": f"at most {latent_rate(1)}, if not given",
        "--scale-lr": f"{distill.scale_lr} if not given",
        "--hidden": f"{distill.hidden:g} if not given",
    }.items():
        assert wanted in said.rpartition(f"{flag} ")[2].partition(" --")[0]
    assert f"(default: {distill.tokens})" in said
    assert f"(default: {block.epochs})" in said


def test_flags_without_a_default_show_none(said: str) -> None:
    assert "default: None" not in said and "default: []" not in said
    assert "0 is one per core (default: 0)" in said


def test_exit_codes_are_those_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"], dict.fromkeys(COMMANDS, lambda _: 0))
    said = capsys.readouterr().out
    assert f"{BAD_INPUT} the source" in said and f"{INTERRUPTED} interrupted" in said
