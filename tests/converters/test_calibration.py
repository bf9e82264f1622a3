"""Which characters of a source are text, how it is cut, and what is said if it is too short."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from converters import calibration
from converters.calibration import CalibrationError, Text, cut, load_texts, sample, token_ids
from tests.tiny import add_tokenizer

LINES = ("one two, three\n", " = a title = \n \n", "\n\n\n", "no end ", " \n x", "")


class Words:
    """A token a character."""

    bos_token_id = None

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


def test_every_text_is_held_out_from():
    texts = [Text(letter, letter * 400) for letter in "abc"]
    found = sample(texts, Words(), 6, 1, 10)
    assert found.held_out[:, 0].tolist() == [ord(letter) for letter in "abc"]
    assert found.record["held_out"] == 3


def test_windows_begin_as_texts_do(tmp_path):
    plain, begins = (tmp_path / name for name in ("plain", "begins"))
    add_tokenizer(plain)
    add_tokenizer(begins, begins=True)
    text = Text("t", "the quick brown fox " * 99)
    one, two = (
        sample([text], AutoTokenizer.from_pretrained(path), 5, 2, 17) for path in (plain, begins)
    )
    assert one.bos is None and not one.record["bos"] and not (one.train == 1).any()
    assert two.bos == 1 and two.record["bos"] and two.train.shape == (5, 17)
    for windows in (two.train, two.held_out, cut(two.train, 8, two.bos)):
        assert (windows[:, 0] == 1).all() and not (windows[:, 1:] == 1).any()
    assert cut(two.train, 8, two.bos).shape == (10, 8)
    assert torch.equal(cut(two.train, 9, two.bos)[:2, 1:].flatten(), two.train[0, 1:])
    assert torch.equal(cut(one.train, 8, None), one.train[:, :16].reshape(10, 8))
    with pytest.raises(CalibrationError, match="windows of 1 have no room"):
        cut(two.train, 1, two.bos)


def test_the_record_says_how_many_windows_were_held_out():
    found = sample([Text("a", "x" * 1000)], Words(), 20, 3, 10)
    assert torch.equal(found.held_out, torch.full((3, 10), ord("x")))
    assert (found.record["windows"], found.record["held_out"]) == (20, 3)
