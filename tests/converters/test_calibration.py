"""Which characters of a source are text, how it is cut, and what is said if it is too short."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from converters import calibration
from converters.calibration import CalibrationError, Text, load_texts, sample, token_ids

LINES = ("one two, three\n", " = a title = \n \n", "\n\n\n", "no end ", " \n x", "")


class Words:
    """A token a character."""

    def __call__(self, pieces, **_):
        return type("Encoded", (), {"input_ids": [[ord(c) for c in text] for text in pieces]})


def test_text_is_divided_before_it_is_cut():
    found = sample([Text("t", "a" * 950 + "b" * 50)], Words(), 4, 2, 10)
    assert not torch.isin(found.train, ord("b")).any() and (found.held_out == ord("b")).all()


@pytest.fixture(scope="module")
def whole():
    """A byte-level tokenizer with tokens for words and for lines' ends."""
    learnt = Tokenizer(models.BPE())
    learnt.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False)
    learnt.train_from_iterator([line * 9 for line in LINES], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=learnt)


@pytest.mark.parametrize("line", LINES)
def test_a_text_in_pieces_has_the_tokens_of_the_whole(monkeypatch, whole, line):
    text = line * 40 + "the end"
    expected = whole(text, add_special_tokens=False).input_ids
    monkeypatch.setattr(calibration, "PIECE", 16)
    assert token_ids(whole, text) == expected
    assert "".join(calibration._pieces(text)) == text


def test_an_empty_text_has_no_tokens():
    assert token_ids(Words(), "") == []


def test_lines_of_jsonl_end_where_json_says(tmp_path):
    texts = ["one\u2028two\u2029three\x85four", "five\nsix"]
    file = tmp_path / "text.jsonl"
    rows = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    file.write_text("\n\n".join(rows) + "\n", encoding="utf-8")
    (found,) = load_texts([str(file)])
    assert found == Text("text.jsonl", "\n\n".join(texts))


def test_a_long_jsonl_is_read_as_far_as_it_is_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "MAX_CHARS", 10)
    file = tmp_path / "text.jsonl"
    file.write_text('{"text": "12345678"}\n{"text": "12345678"}\n{"text": "not read"')
    (found,) = load_texts([str(file)])
    assert found.content == "12345678\n\n12345678"


@pytest.mark.parametrize(
    ("characters", "message"),
    [(5, "^calibration text a: 4 tokens"), (50, "the held-out part of calibration text a: 3 ")],
)
def test_a_short_text_is_told_which_part_is_short(characters, message):
    with pytest.raises(CalibrationError, match=message):
        sample([Text("a", "x" * characters)], Words(), 2, 1, 8)


def test_the_record_says_how_many_windows_were_held_out():
    found = sample([Text("a", "x" * 1000)], Words(), 20, 3, 10)
    assert torch.equal(found.held_out, torch.full((3, 10), ord("x")))
    assert (found.record["windows"], found.record["held_out"]) == (20, 3)
