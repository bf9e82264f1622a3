import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from converters import calibration
from converters.calibration import Text, sample, token_ids

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
