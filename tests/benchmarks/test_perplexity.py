import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from perplexity import (  # noqa: E402
    Window,
    join_text,
    make_windows,
    perplexity,
    problem,
    score_transformers,
)

from tests.tiny import add_tokenizer, make_packed, random_model  # noqa: E402


def test_gptq_joins_rows_of_the_data_set():
    rows = ["", " = Title = \n", "", " Text . \n"]  # as Hugging Face stores them
    assert join_text(" \n = Title = \n \n Text . \n", "gptq") == "\n\n".join(rows)
    assert join_text("a \n\n", "raw") == "a \n\n"


def test_windows_without_overlap_score_all_but_their_first_token():
    windows = list(make_windows(list(range(10)), context=4, stride=4))
    assert windows == [Window([0, 1, 2, 3], 1), Window([4, 5, 6, 7], 1)]


def test_a_bos_token_lets_the_first_token_be_scored():
    windows = list(make_windows(list(range(8)), context=4, stride=4, bos=99))
    assert windows == [Window([99, 0, 1, 2, 3], 1), Window([99, 4, 5, 6, 7], 1)]


@pytest.mark.parametrize("bos", [None, 99])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_overlapping_windows_score_each_token_once(stride, bos):
    tokens = list(range(20))
    windows = make_windows(tokens, context=5, stride=stride, bos=bos)
    scored = [t for w in windows for t in w.tokens[w.first :]]
    assert scored == tokens[0 if bos else 1 : len(scored) + (0 if bos else 1)]
    assert len(scored) >= 16


@pytest.mark.parametrize(("context", "stride"), [(4, 5), (1, 1), (4, 0)])
def test_impossible_windows_are_refused(context, stride):
    with pytest.raises(ValueError, match="--stride"):
        list(make_windows([1, 2, 3, 4], context, stride))


def test_perplexity_is_per_scored_token():
    windows = [Window([1, 2, 3], 1), Window([1, 2, 3], 2)]
    assert perplexity([2 * math.log(7), math.log(7)], windows) == pytest.approx(7)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([200.0, 201.0], None),
        ([200.0, 203.0], "the backends disagree by more than 1%"),
        ([203.0, 200.0], "the backends disagree by more than 1%"),
        ([2.0, math.nan], "the perplexity through vllm is not a number"),
        ([math.nan, 2.0], "the perplexity through transformers is not a number"),
        ([math.nan], "the perplexity through transformers is not a number"),
    ],
)
def test_what_is_wrong_with_the_backends_is_said(values, said):
    backends = ("transformers", "vllm")
    rows = [{"backend": b, "perplexity": v} for b, v in zip(backends, values, strict=False)]
    found = problem(rows)
    assert found is None if said is None else str(found).startswith(said)


def test_transformers_scores_what_the_logits_say(tmp_path):
    model = random_model("llama")
    model.save_pretrained(tmp_path)
    tokens = [5, 17, 301, 44, 9]
    with torch.no_grad():
        logprobs = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    expected = -sum(float(logprobs[i - 1, tokens[i]]) for i in range(2, 5))
    found = score_transformers(tmp_path, [Window(tokens, 2)], "float32")
    assert found == pytest.approx([expected], rel=1e-5)


@pytest.mark.slow
def test_both_backends_agree_on_a_packed_model(tmp_path):
    model = make_packed("llama", tmp_path / "model")
    add_tokenizer(model)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    command = [sys.executable, str(BENCHMARKS / "perplexity.py"), str(model), "--text", str(text)]
    command += ["--context", "64", "--limit", "4", "--backend", "transformers", "vllm"]
    command += ["--json", str(tmp_path / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["backend"] for row in rows] == ["transformers", "vllm"]
    assert rows[0]["perplexity"] == pytest.approx(rows[1]["perplexity"], rel=5e-3)
