"""Calibration text that the dense model writes itself, with vLLM and with transformers."""

import json
import logging

import pytest
from transformers import AutoTokenizer

from converters.calibration import CalibrationError
from converters.fitting import self_text, vllm_writer
from converters.fitting.vllm_writer import LENGTH, enough, write_with_vllm
from converters.hf_to_bmos import main
from converters.options import Options
from converters.sources import open_source
from tests.converters.models import make_dense, make_gguf
from tests.tiny import add_tokenizer
from vllm_bmos.checkpoint.reader import Checkpoint


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("converters.fitting.self_text.CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path):
    path = make_dense(tmp_path / "dense")
    add_tokenizer(path)
    return path


def test_sequences_are_written_until_there_are_about_enough_tokens():
    asked = []

    def write(starts):
        asked.append(starts)
        return [[start] * (LENGTH // 4) for start in starts]  # all end early

    rows = enough(write, 50, 4 * LENGTH, 3)
    assert sum(map(len, rows)) >= 4 * LENGTH
    assert list(map(len, asked)) == [4, 12]
    assert all(0 <= start < 50 for starts in asked for start in starts)
    assert len({start for starts in asked for start in starts}) > 3
    assert enough(write, 50, 4 * LENGTH, 3) == rows != enough(write, 50, 4 * LENGTH, 4)


def test_a_sequence_is_cut_behind_its_end():
    assert self_text.until_end([2, 5, 2, 0, 0], {2}) == [2, 5, 2]
    assert self_text.until_end([2, 5, 6], {2}) == [2, 5, 6]


def test_the_text_is_written_once_and_recorded(source, cache):
    size = ("--windows", "4", "--length", "16", "--experts", "1")
    flags = ("--stage", "hessian", "--calibration", "self:800:transformers", *size)
    for name in ("one", "two"):
        assert main([str(source), str(source.parent / name), *flags]) == 0
    (file,) = cache.iterdir()
    record = [
        Checkpoint(source.parent / name).config.provenance["calibration"]["texts"]
        for name in ("one", "two")
    ]
    assert record[0] == record[1] and record[0][0]["name"] == "self:800:transformers"
    assert len(file.read_text()) > 200


@pytest.mark.parametrize("wrong", ["self:x", "self:0", "self:800:pen", "self:"])
def test_another_name_is_refused(source, cache, wrong, capsys):
    target = source.parent / "packed"
    assert main([str(source), str(target), "--stage", "hessian", "--calibration", wrong]) == 1
    assert "expected self:N with N tokens to write" in capsys.readouterr().err
    assert not target.exists() and not cache.exists()


def text_of(path, name):
    tokenizer_path = path if path.is_dir() else path.parent
    source = open_source(path, Options(experts=1))
    return self_text.self_text(source, AutoTokenizer.from_pretrained(tokenizer_path), name, 0)


def test_transformers_writes_where_vllm_is_missing_and_says_so(source, cache, monkeypatch, caplog):
    monkeypatch.setattr("converters.fitting.vllm_writer.find_spec", lambda _: None)
    with caplog.at_level(logging.INFO):
        assert text_of(source, "self:20").content
    assert "with transformers, as vLLM is not installed" in caplog.text
    with pytest.raises(CalibrationError, match="self:20:vllm: vLLM is not installed"):
        text_of(source, "self:20:vllm")


def test_the_sources_own_way_of_generating_is_not_taken(source, cache, monkeypatch):
    plain = text_of(source, "self:60:transformers")
    (cache / next(cache.iterdir()).name).unlink()
    file = source / "generation_config.json"
    config = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**config, "do_sample": True, "repetition_penalty": 50.0}))
    assert text_of(source, "self:60:transformers") == plain


def test_vllm_does_not_write_with_a_gguf_file(tmp_path):
    path, _ = make_gguf(tmp_path / "tiny.gguf")
    assert vllm_writer.reason_against(path) in (
        "vLLM loads directories, not tiny.gguf",
        "vLLM is not installed",
    )


def test_vllm_writes(source, cache, monkeypatch, caplog):
    pytest.importorskip("vllm")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    # vLLM's attention uses AMX without asking the kernel for it; what torch compiles asks.
    monkeypatch.delenv("TORCH_COMPILE_DISABLE", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")  # as under torchrun: vLLM must not wait for the other
    with caplog.at_level(logging.INFO):
        text = text_of(source, "self:1500")
    assert "writes 1500 tokens with vllm" in caplog.text
    assert len(text.content) > 500 and len(set(text.content.split())) > 20
    assert text_of(source, "self:1500") == text  # from the cache


def test_what_vllm_cannot_load_is_named(tmp_path):
    pytest.importorskip("vllm")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CalibrationError, match=r"empty \(exit code 1; see above\)"):
        write_with_vllm(tmp_path / "empty", 50, 10, 0)
