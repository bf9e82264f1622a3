import json
import sys
from pathlib import Path

import pytest
import zero_shot

from tests.tiny import add_tokenizer, make_packed

DATA = Path(__file__).parents[2].parent / "shared" / "data" / "zero_shot"

ROWS = {
    "piqa": {"query": "Question: a?\n", "choices": ["yes", "no"], "gold": 1},
    "winogrande": {"context_options": ["A is", "B is"], "continuation": "big.", "gold": 0},
}


def lm_eval(module="lm_eval"):
    return pytest.importorskip(module, reason="pip install 'vllm-bmos[eval]'")


def stub(score):
    """A model for lm-eval that scores a continuation by a function; it notes what it is asked."""
    LM = lm_eval("lm_eval.api.model").LM

    class Model(LM):
        def loglikelihood(self, requests):
            self.seen = [request.args for request in requests]
            return [(score(*asked), False) for asked in self.seen]

        def loglikelihood_rolling(self, requests):
            raise NotImplementedError

        def generate_until(self, requests):
            raise NotImplementedError

    return Model()


def write(folder, task, *rows):
    (folder / f"{task}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))


def test_a_question_is_asked_as_lm_eval_does(tmp_path):
    write(tmp_path, "piqa", ROWS["piqa"])
    model = stub(lambda context, continuation: float(continuation == " no"))
    result = zero_shot.evaluate(model, tmp_path, ["piqa"], None)
    assert sorted(model.seen) == [
        ("Question: a?\nAnswer:", " no"),
        ("Question: a?\nAnswer:", " yes"),
    ]
    assert result["piqa"]["acc"] == 1 and result["piqa"]["reported"] == 1
    assert result["piqa"]["metric"] == "acc_norm" and result["piqa"]["questions"] == 1


def test_winogrande_compares_beginnings(tmp_path):
    write(tmp_path, "winogrande", ROWS["winogrande"], {**ROWS["winogrande"], "gold": 1})
    model = stub(lambda context, continuation: float(context == "A is"))
    result = zero_shot.evaluate(model, tmp_path, ["winogrande"], None)
    assert ("B is", " big.") in model.seen
    assert result["winogrande"]["reported"] == 0.5
    assert zero_shot.evaluate(model, tmp_path, ["winogrande"], 1)["winogrande"]["acc"] == 1


def test_normalised_accuracy_counts_characters(tmp_path):
    row = {"query": "Q", "choices": ["ab", "abcdefgh"], "gold": 1}
    write(tmp_path, "arc_easy", row)

    # Per character the long answer is likelier.
    model = stub(lambda context, continuation: -2.0 if continuation == " ab" else -4.0)
    result = zero_shot.evaluate(model, tmp_path, ["arc_easy"], None)["arc_easy"]
    assert (result["acc"], result["acc_norm"], result["reported"]) == (0, 1, 1)


def test_files_are_checked_before_the_model_is_loaded(tmp_path, monkeypatch, caplog):
    write(tmp_path, "piqa", {"query": "Q", "choices": ["a"]})
    for task, message in (("boolq", "boolq.jsonl is missing"), ("piqa", "line 1: 'gold'")):
        arguments = ["zero_shot.py", "nowhere", "--data", str(tmp_path), "--tasks", task]
        monkeypatch.setattr(sys, "argv", arguments)
        assert zero_shot.main() == 2
        assert message in caplog.text


@pytest.mark.skipif(not DATA.is_dir(), reason="no ../shared/data/zero_shot beside this checkout")
@pytest.mark.parametrize("task", zero_shot.TASKS)
def test_the_shared_files_are_what_the_tasks_expect(task):
    rows = zero_shot.read_rows(DATA, task)
    options = "context_options" if task == "winogrande" else "choices"
    assert len(rows) > 1000
    assert all(0 <= row["gold"] < len(row[options]) for row in rows)


def run(tmp_path, backend, *flags):
    lm_eval()
    rows = [{"query": f"Question: {n}?", "choices": ["a b", "c"], "gold": n % 2} for n in range(6)]
    write(tmp_path, "boolq", *rows)
    out = tmp_path / f"{backend}.json"
    sys.argv = ["zero_shot.py", str(tmp_path / "model"), "--data", str(tmp_path)]
    sys.argv += ["--tasks", "boolq", "--backend", backend, "--dtype", "float32"]
    sys.argv += ["--json", str(out), *flags]
    assert zero_shot.main() == 0
    return json.loads(out.read_text())


def test_a_packed_model_is_asked_through_transformers(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [])
    add_tokenizer(make_packed("llama", tmp_path / "model"))
    result = run(tmp_path, "transformers", "--limit", "4")
    assert result["tasks"]["boolq"]["questions"] == 4
    assert result["average"] == result["tasks"]["boolq"]["acc"]


@pytest.mark.slow
def test_both_backends_answer_alike(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [])
    add_tokenizer(make_packed("llama", tmp_path / "model"))
    ours, theirs = (run(tmp_path, backend) for backend in zero_shot.BACKENDS)
    assert ours["tasks"] == theirs["tasks"]
