"""Which characters of a source are text, and what is said of one that is too short."""

import json

import pytest
import torch

from converters import calibration
from converters.calibration import CalibrationError, Text, load_texts, sample


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


class Letters:
    """A tokenizer whose tokens are characters."""

    def __call__(self, pieces, **_):
        return type("Encoding", (), {"input_ids": [[ord(c) for c in text] for text in pieces]})


@pytest.mark.parametrize(
    ("characters", "message"),
    [(5, "^calibration text a: 4 tokens"), (50, "the held-out part of calibration text a: 3 ")],
)
def test_a_short_text_is_told_which_part_is_short(characters, message):
    with pytest.raises(CalibrationError, match=message):
        sample([Text("a", "x" * characters)], Letters(), 2, 1, 8)


def test_the_record_says_how_many_windows_were_held_out():
    found = sample([Text("a", "x" * 1000)], Letters(), 20, 3, 10)
    assert torch.equal(found.held_out, torch.full((3, 10), ord("x")))
    assert (found.record["windows"], found.record["held_out"]) == (20, 3)
