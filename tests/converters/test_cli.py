"""The command line: exit codes, what goes to stdout, and every option once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from converters.arguments import _size
from converters.hf_to_bmos import main
from tests.converters.models import make_dense, make_official
from tests.tiny import add_tokenizer, make_packed
from vllm_bmos.checkpoint import Checkpoint

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def source(tmp_path):
    return make_official(tmp_path / "source")


def test_convert_is_the_default_command(tmp_path, source, capsys):
    assert main([str(source), str(tmp_path / "a")]) == 0
    out = capsys.readouterr()
    assert "packed 14 layers at 5.352 bits per weight; 0 of 27,840 weights" in out.out
    assert "of kind official" in out.err and "WARNING" not in out.err
    assert main(["convert", str(source), str(tmp_path / "b")]) == 0


def test_a_data_free_stage_warns(tmp_path, capsys):
    source = make_dense(tmp_path / "source")
    assert main([str(source), str(tmp_path / "a"), "--quiet"]) == 0
    assert "its text is garbage" in capsys.readouterr().err
    card = (tmp_path / "a/README.md").read_text()
    assert "its text is garbage" in card and "| stage | svid |" in card


def test_as_a_file_and_as_a_module(tmp_path, source):
    script = [str(ROOT / "converters/hf_to_bmos.py")]
    for number, command in enumerate((script, ["-m", "converters.hf_to_bmos"])):
        target = str(tmp_path / f"target{number}")
        done = subprocess.run(
            [sys.executable, *command, str(source), target],
            cwd=ROOT if command[0] == "-m" else tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("\n") == 2


def test_push_to_hub_is_asked_for_and_private(tmp_path, source, monkeypatch):
    calls = []

    class Api:
        def create_repo(self, name, **options):
            calls.append(("create", name, options["private"]))

        def upload_folder(self, repo_id, folder_path):
            calls.append(("upload", repo_id, sorted(file.name for file in folder_path.iterdir())))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert main([str(source), str(tmp_path / "a")]) == 0 and calls == []
    assert main([str(source), str(tmp_path / "b"), "--push-to-hub", "me/model"]) == 0
    files = ["README.md", "bmos_manifest.json", "config.json", "model.safetensors"]
    assert calls == [("create", "me/model", True), ("upload", "me/model", files)]


def test_importing_the_converter_does_not_import_vllm():
    code = "import converters.hf_to_bmos, sys; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_dry_run_writes_nothing(tmp_path, source, capsys):
    assert main([str(source), str(tmp_path / "a"), "--dry-run", "--max-shard-size", "10KB"]) == 0
    out = capsys.readouterr().out
    assert "repack, E = 4, scales in float16" in out and "packed linear layers" in out
    table = [line.rsplit(maxsplit=3) for line in out.split("\n\n")[1].splitlines()[1:]]
    *parts, total = ([int(cell.replace(",", "")) for cell in row[1:]] for row in table)
    assert [sum(column) for column in zip(*parts, strict=True)] == total
    assert total[2] == 34384
    assert sorted(file.name for file in tmp_path.iterdir()) == ["source"]


def test_options_reach_the_checkpoint(tmp_path):
    source = make_dense(tmp_path / "source")
    flags = ["--experts", "2", "--scale-dtype", "bfloat16", "--ignore", "q_proj", "--ignore", "k_p"]
    assert main([str(source), str(tmp_path / "a"), *flags, "--jobs", "1"]) == 0
    config = Checkpoint(tmp_path / "a").config
    assert (config.num_experts, config.scale_dtype) == (2, "bfloat16")
    assert config.ignore == ("q_proj", "k_p") and len(config.modules) == 10


def test_verify_and_inspect(tmp_path, source, capsys):
    target = str(tmp_path / "a")
    main([str(source), target])
    capsys.readouterr()
    assert main(["verify", target, "--source", str(source)]) == 0
    out = capsys.readouterr().out
    assert "valid, 14 layers, 63 tensors" in out and "match the source" in out
    assert main(["verify", target, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"] == 14
    assert main(["inspect", target]) == 0
    assert "model.layers.1.mlp.down_proj" in capsys.readouterr().out
    assert main(["inspect", target, "--json"]) == 0
    layer = json.loads(capsys.readouterr().out)["layers"][0]
    assert layer["N"] == layer["K"] == 40 and 0.4 < layer["positive"] < 0.6
    assert layer["bits_per_weight"] == 8 * (40 * 5 + 2 * 4 * 40 * 3) / 1600
    assert 0.1 < layer["in_spread"] < 0.5


def test_exit_code_of_a_bad_source_and_checkpoint(tmp_path, source, capsys):
    assert main([str(tmp_path / "absent"), str(tmp_path / "a")]) == 1
    assert main(["verify", str(source)]) == 1
    assert main(["inspect", str(source)]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3 and all(line.startswith("error: ") for line in errors)


def test_exit_code_of_a_bad_target(tmp_path, source, capsys):
    (tmp_path / "a").write_text("mine")
    assert main([str(source), str(tmp_path / "a")]) == 3
    assert main([str(source), str(tmp_path / "a/b")]) == 3
    assert main([str(source), "/proc/a"]) == 3
    assert capsys.readouterr().err.count("error: ") == 3


@pytest.mark.parametrize(
    "flags",
    [
        ["--experts", "0"],
        ["--experts", "257"],
        ["--experts", "four"],
        ["--ignore", "("],
        ["--stage", "none"],
        ["--scale-dtype", "float8"],
        ["--max-shard-size", "big"],
        ["--max-shard-size", "0"],
        ["--jobs", "-1"],
        ["--fsdp"],  # without torchrun
        ["--no-such-flag"],
    ],
)
def test_exit_code_of_wrong_usage(tmp_path, source, flags, capsys):
    with pytest.raises(SystemExit) as exit:
        main([str(source), str(tmp_path / "a"), *flags])
    assert exit.value.code == 2 and flags[0] in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("arch", ["llama", "mixtral"])  # Mixtral's names differ on the disk
def test_inspect_measures_every_router(tmp_path, capsys, arch):
    packed = make_packed(arch, tmp_path / "packed")
    add_tokenizer(packed)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 5)
    line = ["inspect", str(packed), "--text", str(tmp_path / "text.txt")]
    assert main([*line, "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert layers and all(0 < layer["router_entropy"] <= 2 for layer in layers)
    assert main(line) == 0 and "router bits" in capsys.readouterr().out
    (tmp_path / "text.txt").write_text("")
    assert main(line) == 1 and "expected text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("500mb", 5 * 10**8), ("1.5K", 1500), ("123", 123)]
)
def test_sizes(text, size):
    assert _size(text) == size
