"""The files that travel with a model."""

import json
import os

import pytest
from tokenizers import Tokenizer, models

from converters.options import Options
from converters.pipeline import convert
from converters.plan import make_plan
from tests.converters.models import make_official
from vllm_bmos.checkpoint import FormatError


@pytest.fixture
def source(tmp_path):
    return make_official(tmp_path / "source")


def plan(source):
    return make_plan(source, Options())


TRAVELS = {
    "tokenizer.json": "{}",
    "tokenizer_config.json": "{}",
    "special_tokens_map.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "generation_config.json": '{"temperature": 0.6}',
    "LICENSE.txt": "free",
}
STAYS = {
    "modeling_evil.py": "raise SystemExit",
    "training_args.bin": "x",
    "optimizer.pt": "x",
    ".gitattributes": "x",
    "README.md": "---\nlicense: cc-by-nc-4.0\n---\nOld card.",
}


def test_what_travels(tmp_path, source):
    for name, text in (TRAVELS | STAYS).items():
        (source / name).write_text(text)
    (source / "tokenizer_files").mkdir()
    convert(plan(source), tmp_path / "target")
    for name, text in TRAVELS.items():
        assert (tmp_path / "target" / name).read_text() == text
    found = set(os.listdir(tmp_path / "target"))
    made = {"config.json", "model.safetensors", "bmos_manifest.json", "README.md"}
    assert found == made | TRAVELS.keys()
    card = (tmp_path / "target/README.md").read_text()
    assert "license: cc-by-nc-4.0" in card and "Old card" not in card


def test_a_missing_tokenizer_json_is_built(source):
    """From a slow tokenizer's own files, as transformers reads them."""
    vocab = {chr(97 + i): i for i in range(26)} | {"<unk>": 26, "ab": 27}
    Tokenizer(models.BPE(vocab, [("a", "b")], unk_token="<unk>")).model.save(str(source))
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    files = plan(source).side_files
    assert {"vocab.json", "merges.txt", "tokenizer_config.json"} <= files.keys()
    built = Tokenizer.from_str(files["tokenizer.json"].decode())
    assert built.encode("abc").ids == [27, 2]


def test_a_tokenizer_that_cannot_be_built_is_said_and_travels(source, caplog):
    (source / "tokenizer.model").write_bytes(b"not sentencepiece")
    assert plan(source).side_files.keys() == {"tokenizer.model"}
    assert "tokenizer.json could not be built" in caplog.text


def test_no_tokenizer_is_said(source, caplog):
    assert plan(source).side_files == {}
    assert "has no tokenizer" in caplog.text


def test_a_model_card_that_is_a_link_is_found_before_the_work(tmp_path, source):
    (tmp_path / "secret").write_text("---\nlicense: mit\n---\n")
    (source / "README.md").unlink(missing_ok=True)
    (source / "README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(FormatError, match=r"README\.md is a link to .*secret, outside"):
        make_plan(source, Options())


def test_a_link_to_a_secret_is_not_copied(tmp_path, source):
    (tmp_path / "secret").write_text("secret")
    (source / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(FormatError, match=r"tokenizer\.json is a link to .*secret, outside"):
        plan(source)


def test_a_pipe_is_not_read(source):
    os.mkfifo(source / "tokenizer.json")
    with pytest.raises(FormatError, match="not a regular file"):
        plan(source)


def test_an_endless_side_file_is_not_read(source):
    with (source / "tokenizer.json").open("wb") as file:
        file.truncate(1 << 40)  # sparse: takes no room on the disk
    with pytest.raises(FormatError, match="has more than"):
        plan(source)
