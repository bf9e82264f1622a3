"""The comparison resumes row by row and refuses to mix settings."""

import json
import sys
from pathlib import Path

import pytest
import quality
import quality_cost
import quality_methods
from memory import MODELS

from converters.arguments import COMMANDS, parse
from tests.tiny import add_tokenizer, make_packed, random_model

EFFORT = {"seconds": 2.0, "cpu_seconds": 3.0, "peak_rss_bytes": 1, "whole": True}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A place where methods are made and scored by stand-ins that note their calls."""
    random_model("llama").save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("a text")
    calls = []

    def make(method, model, target, fit, threads, made):
        if method.key in made:
            return quality_methods.make(method, model, target, fit, threads, made)
        calls.append(("make", method.key))
        target.mkdir(exist_ok=True)
        (target / "quantization.json").write_text(json.dumps({"method": method.key}))
        return EFFORT

    def script(name, target, output, flags, args):
        calls.append((name, target.name))
        if name == "zero_shot.py":
            return {"tasks": {}, "average": 0.5, "limit": None}
        return {"rows": [{"perplexity": 30.0, "scored_tokens": 9}], "protocol": {}}

    monkeypatch.setattr(quality, "make", make)
    monkeypatch.setattr(quality, "_script", script)
    monkeypatch.setattr(quality, "bits_per_weight", lambda _: {"bits": 2.1, "published_bits": 2})
    return tmp_path, calls


def run(folder, monkeypatch, *flags, methods=("float16", "gptq")):
    arguments = ["quality.py", "--model", str(folder / "model"), "--work", str(folder / "work")]
    arguments += ["--json", str(folder / "out.json"), "--methods", *methods, *flags]
    if "--text" not in flags:
        arguments += ["--text", str(folder / "text.txt")]
    monkeypatch.setattr(sys, "argv", arguments)
    return quality.main()


def test_a_finished_row_is_not_made_again(folder, monkeypatch):
    path, calls = folder
    assert run(path, monkeypatch, methods=["gptq"]) == 0
    assert calls == [("make", "gptq"), ("perplexity.py", "gptq")]
    assert run(path, monkeypatch) == 0
    assert calls[2:] == [("make", "float16"), ("perplexity.py", "float16")]
    rows = json.loads((path / "out.json").read_text())["rows"]
    assert [row["key"] for row in rows] == ["gptq", "float16"]
    assert rows[0]["perplexity"]["text.txt"]["perplexity"] == 30
    assert rows[0]["effort"] == EFFORT
    assert (path / "out.png").exists()


def test_another_text_or_zero_shot_completes_the_rows(folder, monkeypatch):
    path, calls = folder
    (path / "other.txt").write_text("another")
    assert run(path, monkeypatch, methods=["gptq"]) == 0
    texts = ["--text", str(path / "text.txt"), str(path / "other.txt")]
    assert run(path, monkeypatch, *texts, "--zero-shot", str(path), methods=["gptq"]) == 0
    assert [call[0] for call in calls[2:]] == ["make", "perplexity.py", "zero_shot.py"]
    (row,) = json.loads((path / "out.json").read_text())["rows"]
    assert list(row["perplexity"]) == ["text.txt", "other.txt"]
    assert row["zero_shot"]["average"] == 0.5


def test_a_failing_method_leaves_the_others_rows(folder, monkeypatch):
    path, _ = folder
    assert run(path, monkeypatch, methods=["float16"]) == 0

    def fail(*_):
        raise quality_methods.MethodError("gptq failed")

    monkeypatch.setattr(quality, "make", fail)
    assert run(path, monkeypatch) == 1
    assert len(json.loads((path / "out.json").read_text())["rows"]) == 1


def test_other_settings_and_unknown_methods_are_refused(folder, monkeypatch, caplog):
    path, calls = folder
    assert run(path, monkeypatch) == 0
    assert run(path, monkeypatch, "--windows", "7") == 2
    assert "holds results of settings" in caplog.text
    assert run(path, monkeypatch, methods=["gtpq"]) == 2
    assert "--methods gtpq: known are float16" in caplog.text
    assert len(calls) == 4


def test_the_comparisons_are_those_of_the_paper():
    paper = [method.key for method in quality_methods.methods("paper")]
    assert paper[:5] == ["float16", "omniquant", "gptq", "pb-llm", "billm"]
    assert {"hessian-e1", "qat-e1", "experts-e1", "experts-e4"} <= set(paper)
    assert not {"svid-e4", "qat-e4"} & set(paper)  # their experts are equal
    experts = [method.key for method in quality_methods.methods("experts")]
    assert experts == ["experts-e1", "experts-e2", "experts-e4", "experts-e8"]
    sets = quality_methods.methods("calibration")
    assert [method.key for method in sets] == ["qat-e1-c4", "qat-e1-wiki", "qat-e1"]
    assert sets[0].texts[0].endswith("c4.utf8") and sets[2].texts == ()
    assert quality_methods.methods("calibration", "experts")[2].key == "experts-e4"


def test_every_method_has_the_same_calibration_flags(tmp_path):
    fit = {"windows": 5, "length": 64, "seed": 3, "calibration": ["a.txt"], "tokens": 9}
    fit |= {"steps": 2, "batch": 1}
    for method in quality_methods.methods("paper"):
        line = " ".join(quality_methods.command(method, tmp_path, tmp_path / "out", fit, 3))
        looks_at_text = method.stage != "svid"
        assert ("--length 64 --seed 3" in line) == looks_at_text
        assert ("--calibration a.txt" in line) == looks_at_text
        assert ("--windows 5" in line) == (looks_at_text and not method.trains)
    mine = quality_methods.methods("calibration", "hessian", ["dir/mine.txt", "b.jsonl"])
    assert [method.key for method in mine] == ["hessian-e1-mine", "hessian-e1-b", "hessian-e1"]
    assert [method.texts for method in mine] == [("dir/mine.txt",), ("b.jsonl",), ()]
    with pytest.raises(ValueError, match="expected texts of different names"):
        quality_methods.methods("calibration", "hessian", ["x/a.txt", "y/a.txt"])
    only_c4 = quality_methods.methods("calibration")[0]
    line = quality_methods.command(only_c4, tmp_path, tmp_path / "out", fit, 3)
    assert "a.txt" not in line and line[line.index("--calibration") + 1].endswith("c4.utf8")


@pytest.mark.parametrize("comparison", quality_methods.COMPARISONS)
def test_commands_are_what_the_converter_takes(comparison):
    fit = {"windows": 5, "length": 64, "seed": 3, "calibration": ["a.txt"], "tokens": 9}
    methods = [m for m in quality_methods.methods(comparison) if m.baseline is None]
    assert methods
    for method in methods:
        start = Path(method.start.key) if method.start else None
        _, script, *line = quality_methods.command(method, Path("m"), Path("out"), fit, 2, start)
        assert script.endswith("hf_to_bmos.py")
        found = parse(line, dict.fromkeys(COMMANDS, lambda _: 0))
        assert (found.stage, found.experts, found.jobs) == (method.stage, method.E, 2)
        assert found.tokens == 9 or not method.trains
        assert found.start_from == start


def test_bits_of_a_packed_model_count_signs_scales_and_routers(tmp_path):
    make_packed("llama", tmp_path / "model", E=4)
    weights = signs = scales = 0
    for N, K in [(128, 128)] * 2 + [(64, 128)] * 2 + [(160, 128)] * 2 + [(128, 160)]:
        weights, signs, scales = weights + N * K, signs + N * K, scales + 16 * 4 * (2 * K + N)
    found = quality_methods.bits_per_weight(tmp_path / "model")
    assert found["bits"] == pytest.approx((signs + scales) / weights)


def test_a_model_made_elsewhere_must_say_that_it_was_made_alike(
    folder, monkeypatch, capsys, caplog
):
    path, calls = folder
    elsewhere = path / "elsewhere"
    elsewhere.mkdir()
    record = {"windows": 32, "length": 1024, "seed": 0}
    record["texts"] = [{"name": "c4.utf8"}, {"name": "wiki.utf8"}]
    report = {"method": "gptq", "calibration": record}
    made = ["--made", f"gptq={elsewhere}"]
    (elsewhere / "quantization.json").write_text(json.dumps(report))
    assert run(path, monkeypatch, *made, methods=["gptq"]) == 0
    assert calls == [("perplexity.py", "elsewhere")]
    (row,) = json.loads((path / "out.json").read_text())["rows"]
    assert row["effort"] is None
    for change in ({"method": "billm"}, {"calibration": {**record, "windows": 31}}):
        (path / "out.json").unlink(missing_ok=True)
        (elsewhere / "quantization.json").write_text(json.dumps(report | change))
        assert run(path, monkeypatch, *made, methods=["gptq"]) == 2
    assert "was made by" in caplog.text
    assert run(path, monkeypatch, "--made", f"gtpq={elsewhere}") == 2
    assert "--made gtpq: known are float16" in caplog.text
    with pytest.raises(SystemExit):
        run(path, monkeypatch, "--made", "gptq=/nowhere")


def test_a_packed_model_made_elsewhere_needs_its_stage_and_experts(tmp_path):
    make_packed("llama", tmp_path / "model", E=1)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["quantization_config"]["provenance"] = {"stage": "svid"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    fit = {"windows": 5, "length": 64, "seed": 3, "calibration": ["a.txt"], "tokens": 9}
    methods = {method.key: method for method in quality_methods.methods("paper")}
    quality_methods.check_made(methods["svid-e1"], tmp_path / "model", fit)
    with pytest.raises(ValueError, match="not by"):
        quality_methods.check_made(methods["hessian-e1"], tmp_path / "model", fit)


MAKE = "import sys, pathlib; p = pathlib.Path(sys.argv[1]); p.mkdir(); (p / sys.argv[2]).touch()"
FIT = {"windows": 5, "length": 64, "seed": 3, "calibration": ["a.txt"]}
FIT |= {"tokens": 9, "steps": 7, "batch": 2}


def make(method, model, target, fit, made=None):
    return quality_methods.make(method, model, target, fit, 1, made or {})


@pytest.mark.parametrize(
    ("key", "matter", "do_not"),
    [
        ("float16", {}, {"tokens": 8, "windows": 6, "seed": 4, "calibration": ["b.txt"]}),
        ("gptq", {"windows": 6}, {"tokens": 8, "steps": 8}),
        ("omniquant", {"steps": 8}, {"tokens": 8}),
        ("qat-e1", {"tokens": 8}, {"steps": 8, "calibration": ["elsewhere/a.txt"]}),
        ("qat-e1", {"calibration": ["hf:a/a.txt"]}, {"batch": 1}),
        ("hessian-e1", {"seed": 4}, {"tokens": 8}),
    ],
)
def test_a_model_is_made_once_with_the_settings_that_matter(
    tmp_path, monkeypatch, key, matter, do_not
):
    (method,) = [m for m in quality_methods.methods("paper") if m.key == key]
    model, target = tmp_path / "model", tmp_path / "work" / key
    target.parent.mkdir()
    file = "config.json" if method.baseline is None else "quantization.json"
    line = [sys.executable, "-c", MAKE, str(target), file]
    monkeypatch.setattr(quality_methods, "command", lambda *_: line)
    monkeypatch.setattr(quality_methods.Method, "start", None)
    effort = make(method, model, target, FIT)
    assert effort["whole"]
    assert make(method, model, target, FIT) == effort
    assert make(method, model, target, FIT | do_not) == effort
    for model_now, change in [(model, matter), (tmp_path / "other", {})]:
        if change or model_now != model:
            with pytest.raises(ValueError, match=r"was begun with .* Remove it"):
                make(method, model_now, target, FIT | change)
    (target / file).unlink()  # as if it had been killed
    with pytest.raises(ValueError, match="was begun with"):
        make(method, tmp_path / "other", target, FIT)
    target.with_name(f"{key}.settings.json").unlink()
    with pytest.raises(ValueError, match="settings of its own"):
        make(method, model, target, FIT)
    target.rmdir()
    assert make(method, tmp_path / "other", target, FIT | matter)["whole"]


def test_rows_share_the_models_that_they_start_from(tmp_path, monkeypatch):
    made = []

    def command(method, model, target, fit, threads, start):
        made.append((method.key, start and start.name))
        work = "import time\nwhile time.process_time() < 0.2: pass\n"
        return [sys.executable, "-c", work + MAKE, str(target), "config.json"]

    monkeypatch.setattr(quality_methods, "command", command)
    methods = {method.key: method for method in quality_methods.methods("paper")}
    efforts = {
        key: make(methods[key], tmp_path / "model", tmp_path / key, FIT)
        for key in ("experts-e4", "hessian-e1", "kd-scales-e1")
    }
    assert made == [
        ("hessian-e1", None),
        ("qat-e1", "hessian-e1"),
        ("experts-e4", "qat-e1"),
        ("kd-scales-e1", "hessian-e1"),
    ]
    seconds = {
        path.name.partition(".")[0]: json.loads(path.read_text())["cpu_seconds"]
        for path in tmp_path.glob("*.effort.json")
    }
    assert efforts["hessian-e1"]["cpu_seconds"] == seconds["hessian-e1"] >= 0.2
    chain = sum(seconds[key] for key in ("hessian-e1", "qat-e1", "experts-e4"))
    assert efforts["experts-e4"]["cpu_seconds"] == pytest.approx(chain, abs=0.11)
    # A start that was made elsewhere is taken as it is, and how long it took is not known.
    monkeypatch.setattr(quality_methods, "check_made", lambda *_: None)
    elsewhere = {"hessian-e1": tmp_path / "elsewhere"}
    block = methods["block-e1"]
    assert make(block, tmp_path / "model", tmp_path / "block-e1", FIT, elsewhere) is None
    assert made[-1] == ("block-e1", "elsewhere")
    only_c4 = quality_methods.methods("calibration")[0]
    assert only_c4.start.key == "hessian-e1-c4" and only_c4.start.texts == only_c4.texts


@pytest.mark.parametrize("change", [{"windows": 6}, {"seed": 4}, {}])
def test_a_model_made_elsewhere_says_how_it_was_trained(tmp_path, change):
    record = {"windows": 99, "length": 64, "seed": 3, "texts": [{"name": "a.txt"}]}
    provenance = {"stage": "qat", "calibration": record, "trained_tokens": 9}
    provenance["fit"] = {"distill": {"tokens": 9}}
    make_packed("llama", tmp_path / "model", E=1)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["quantization_config"]["provenance"] = provenance
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    fit = {"windows": 5, "length": 64, "seed": 3, "calibration": ["a.txt"], "tokens": 9} | change
    (method,) = [m for m in quality_methods.methods("paper") if m.key == "qat-e1"]
    assert quality_methods.trained_tokens(tmp_path / "model") == 9
    if "seed" in change:
        with pytest.raises(ValueError, match="was made by"):
            quality_methods.check_made(method, tmp_path / "model", fit)
    else:  # the record's windows are those of training
        quality_methods.check_made(method, tmp_path / "model", fit)


def test_cost_is_proportional_to_layers():
    shapes = quality_cost.shapes_of("LLaMA-1/2-7B")
    assert len(shapes) == 7 * 32 and sum(N * K for N, K in shapes) == pytest.approx(
        6.48e9, rel=0.01
    )
    settings = {"windows": 32, "length": 1024, "steps": 200, "batch": 8}
    row = {"key": "gptq", "name": "GPTQ", "stage": None, "trained_tokens": 0}
    row["effort"] = {"cpu_seconds": 100.0, "whole": True}
    part = {**row, "name": "resumed", "effort": {"cpu_seconds": 1.0, "whole": False}}
    result = {"rows": [row, part], "settings": settings, "model": "half"}
    half = [[N, K, shapes.count((N, K)) // 2] for N, K in set(shapes)]
    result |= {"machine": {"cpu": "CPU", "threads": 2}, "shapes": half}
    table = quality_cost.cost_table(result, "LLaMA-1/2-7B")
    assert "| GPTQ | 100 | 0.1 | 0.0 |" in table and "resumed" not in table
    with pytest.raises(ValueError, match="--predict-cost nowhere"):
        quality_cost.shapes_of("nowhere")
    assert "LLaMA-1/2-7B" in MODELS


def test_training_costs_more_than_the_stage_that_it_starts_from():
    shapes, settings = [(64, 64)], {"windows": 4, "length": 64, "steps": 1, "batch": 1}
    hessian = {"key": "hessian-e1", "stage": "hessian", "trained_tokens": 0}
    qat = {"key": "qat-e1", "stage": "qat", "trained_tokens": 10_000}
    costs = [quality_cost.operations(row, shapes, settings) for row in (hessian, qat)]
    assert costs[1] - costs[0] == 8 * 64 * 64 * 10_000


@pytest.mark.slow
def test_a_real_comparison(tmp_path, monkeypatch):
    random_model("llama").save_pretrained(tmp_path / "model")
    add_tokenizer(tmp_path / "model")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    flags = ["--backend", "transformers", "--dtype", "float32", "--context", "64", "--limit", "2"]
    flags += ["--windows", "2", "--length", "64", "--calibration", str(tmp_path / "text.txt")]
    flags += ["--tokens", "512"]
    methods = ["float16", "gptq", "hessian-e1", "experts-e4"]
    assert run(tmp_path, monkeypatch, *flags, methods=methods) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    bits = [row["bits"] for row in result["rows"]]
    assert bits[0] == 16 and 1 < bits[2] < 1.6 < bits[3] < 2.8 and 2 < bits[1] < 2.4
    assert [row["trained_tokens"] for row in result["rows"]] == [0, 0, 0, 1024]
    seconds = [row["effort"]["cpu_seconds"] for row in result["rows"]]
    assert min(seconds) > 0 and seconds[3] > seconds[2]
