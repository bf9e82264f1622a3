"""The README's tables say what the results say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tables

REPOSITORY = Path(__file__).parents[2]

ROW = {"E": 4, "dtype": "bfloat16", "weights": "cold", "K": 4096, "N": 4096}


def write(path: Path, name: str, rows: list[dict]) -> None:
    facts = {"cpu": "Some CPU", "threads": 2}
    (path / f"{name}.json").write_text(json.dumps({"machine": facts, "rows": rows}))


def test_readme_is_up_to_date() -> None:
    check = [sys.executable, str(REPOSITORY / "benchmarks" / "tables.py"), "--check"]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_linear_rows_keep_their_provider_mode_and_shape(tmp_path: Path) -> None:
    write(
        tmp_path,
        "linear",
        [
            {**ROW, "provider": "vllm_bmos", "mode": "default", "M": 1, "median_us": 41.4},
            {**ROW, "provider": "vllm_bmos", "mode": "int8", "M": 512, "median_us": 9000},
            {**ROW, "provider": "vllm_bmos", "mode": "default", "M": 1, "E": 1, "median_us": 5},
            {**ROW, "provider": "vllm_bf16", "mode": "default", "M": 1, "median_us": 400},
            {
                **ROW,
                "provider": "vllm_bf16",
                "mode": "default",
                "M": 1,
                "weights": "hot",
                "median_us": 1,
            },
        ],
    )
    lines = tables.tables(tmp_path, tables.TABLES).splitlines()
    assert "Some CPU, 2 threads" in lines[0]
    assert "| **vllm-bmos**, default | 41 | - | - | - | - | - |" in lines
    assert "| vllm-bmos, int8 | - | - | - | 9,000 | - | - |" in lines
    assert "| vLLM bf16 | 400 | - | - | - | - | - |" in lines
    assert "linear.png" not in lines[-1]
    (tmp_path / "linear.png").touch()
    assert tables.tables(tmp_path, tables.TABLES).endswith("(benchmarks/results/linear.png)")


def test_a_table_names_the_instructions_and_whose_results_were_wrong() -> None:
    row = {**ROW, "provider": "vllm_bmos", "mode": "default", "M": 1, "median_us": 41.4}
    facts = {"cpu": "Some CPU", "threads": 2, "isa": ["avx2", "avx512_vnni"]}
    wrong = ["vllm_w8a8:w8a8 K=8 N=8 M=1: relative error 0.5", "vllm_w8a8:w8a8 K=8 N=8 M=4: too"]
    text = tables.linear_table({"machine": facts, "rows": [row], "wrong": wrong}, "linear.py")
    assert "Some CPU with AVX-512, 2 threads" in text
    assert text.endswith("Not timed, here or for other M: vLLM W8A8 (relative error 0.5).")


def test_a_model_s_table_says_what_is_missing_and_how_it_was_run() -> None:
    row = {"provider": "vllm_bmos", "mode": "default", "decode_tokens_per_s": {"1": 9.0}}
    row |= {
        "prefill_tokens_per_s": 90.0,
        "resident_gb": 5.6,
        "resident_beyond_vllm_gb": 1.5,
        "weights_seconds": None,
    }
    result = {
        "machine": {"cpu": "Some CPU", "threads": 2},
        "model": {"shape": "llama-7b", "layers": 32, "E": 4},
        "load": {"prompt": 512},
        "missing": {},
        "rows": [row],
    }
    alone = tables.serving_table(result, "serving.py")
    assert "serving.py --providers vllm_bmos`" in alone and alone.endswith("with a tiny model.")
    less = {**row, "mode": tables.IN_8_BITS, "resident_beyond_vllm_gb": 1.25}
    both = tables.serving_table(result | {"rows": [row, less]}, "serving.py")
    assert "| vllm-bmos, `VLLM_BMOS_EMBEDDINGS=int8` | 9.0 | 90.0 |" in both
    assert both.endswith("1.50 more than with a tiny model (1.25 with embeddings in 8 bits).")
    result["missing"] = {"llama_cpp q4_0": "it ended: \nTraceback", "llama_cpp": "not installed"}
    lines = tables.serving_table(result, "serving.py").splitlines()
    assert "serving.py --providers llama_cpp vllm_bmos`" in lines[0]
    assert "Not measured: llama.cpp Q4_0 (it ended)." in lines
    assert "Not measured: llama_cpp (not installed)." in lines


def test_a_baseline_that_was_trained_less_says_so() -> None:
    fit = {"steps": 20, "batch": 2}
    row = {"key": "omniquant", "effort": {"seconds": 1.0}}
    named = tables._training(row, fit)
    assert named == ", 20 steps of 2 windows a block (default 200 of 8)"
    assert tables._training(row | {"key": "gptq"}, fit) == ""
    assert tables._training(row, {"steps": 200, "batch": 8}) == ""
    assert "made elsewhere" in tables._training({"key": "qat-e1", "effort": None}, fit)


def test_commands_replace_the_results_that_the_table_shows(tmp_path: Path) -> None:
    for name in ("linear", "linear_avx2"):
        row = {**ROW, "provider": "vllm_bmos", "mode": "default", "M": 1, "median_us": 41.4}
        result = {"machine": {"cpu": "Some CPU", "threads": 2}, "rows": [row]}
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    first, second = tables.tables(tmp_path, tables.TABLES).split("One linear layer")[1:]
    assert "`python benchmarks/linear.py`" in first
    assert "`python benchmarks/linear.py --json benchmarks/results/linear_avx2.json`" in second


def test_a_gpu_table_names_the_gpu_and_the_dtype() -> None:
    row = {**ROW, "dtype": "float16", "M": 512, "median_us": 41.4}
    rows = [row | {"provider": "vllm_bmos", "mode": "default"}]
    rows.append(row | {"provider": "torch", "mode": "float16", "median_us": 23.0})
    text = tables.linear_table({"machine": {"gpu": "Some GPU"}, "rows": rows}, "linear.py")
    assert "(E=4, float16), median microseconds with cold weights on Some GPU;" in text
    assert "| torch fp16 | - | - | - | 23 | - | - |" in text


def test_quality_rows_say_what_was_scored(tmp_path: Path) -> None:
    score = {"t.txt": {"perplexity": 30.0}}
    row = {"key": "float16", "name": "Float16", "bits": 16, "published_bits": 16}
    row["stage"] = None
    row |= {"trained_tokens": 0, "perplexity": score, "zero_shot": {}, "effort": {}}
    ours = {**row, "key": "qat-e4", "name": "Ours", "bits": 1.04, "trained_tokens": 250_000}
    ours["stage"] = "qat"
    ours |= {"perplexity": {"t.txt": {"perplexity": 90.0}}, "zero_shot": {"average": 0.4}}
    other = {**row, "key": "gptq", "name": "GPTQ", "perplexity": {"t.txt": {"perplexity": 2e6}}}
    settings = {"limit": 8, "context": 1024, "windows": 32, "length": 1024}
    settings |= {"backend": "vllm", "dtype": "bfloat16", "calibration": ["a.txt", "b.txt"]}
    result = {"model": "m.gguf", "settings": settings, "rows": [ours, other, row]}
    (tmp_path / "quality.json").write_text(json.dumps(result))
    lines = tables.tables(tmp_path, tables.TABLES).splitlines()
    assert "m.gguf" in lines[0] and "first 8 windows of 1024 tokens" in lines[0]
    assert "32,768 tokens of a.txt and b.txt" in lines[0]
    assert [line.split("|")[1].strip() for line in lines[4:]] == ["Float16", "GPTQ", "Ours"]
    assert "| Float16 | 16.00 | 16.00 | 0 | 30.0 | 1.0 | - |" in lines
    assert "| Ours | 1.04 | 16.00 | 250,000 | 90.0 | 3.0 | 40.0 % |" in lines
    assert "| GPTQ | 16.00 | 16.00 | 0 | 2.0e+06 | 66,667 | - |" in lines


def test_only_the_marked_part_is_replaced() -> None:
    text = f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n"
    assert (
        tables.with_tables(text, "new", "README.md")
        == f"before\n{tables.BEGIN}\n\nnew\n\n{tables.END}\nafter\n"
    )
    with pytest.raises(ValueError, match="once each"):
        tables.with_tables("no marks", "new", "README.md")


def test_draft_rows_are_beside_the_dense_model_alone(tmp_path: Path) -> None:
    result = {
        "machine": {"cpu": "Some CPU", "threads": 2},
        "dtype": "bfloat16",
        "tokens": 40,
        "pair": {"shape": "llama-1b", "layers": 22},
        "simulated_acceptance": 0.8,
        "alone": {"tokens_per_s": 7.9},
        "drafted": [
            {
                "draft_tokens": 3,
                "tokens_per_s": 13.19,
                "tokens_per_step": 3.02,
                "equal_answers": "4 of 4",
            }
        ],
    }
    (tmp_path / "draft.json").write_text(json.dumps(result))
    lines = tables.tables(tmp_path, tables.TABLES).splitlines()
    assert "llama-1b (22 layers)" in lines[0]
    assert "80% of the tokens" in lines[0]
    assert "draft.py --shape llama-1b --draft-tokens 3 --tokens 40`" in lines[0]
    assert "| 0 | 7.9 | 1 | |" in lines
    assert "| 3 | 13.2 | 3.0 | 4 of 4 |" in lines


def test_a_step_s_table_has_the_settings_it_was_measured_with(tmp_path: Path) -> None:
    facts = {"cpu": "Some CPU", "threads": 2, "environment": {"VLLM_BMOS_EMBEDDINGS": "int8"}}
    result = {
        "machine": facts,
        "model": {"shape": "llama-7b", "layers": 32, "E": 4},
        "prompt": 32,
        "steps": 24,
        "rows": [{"batch": 4, "step_ms": 200.0, "parts_ms": {"lm_head": 50.0}}],
    }
    (tmp_path / "step_avx2_int8.json").write_text(json.dumps(result))
    text = tables.tables(tmp_path, tables.STEPS_OF_VLLM)
    command = "`VLLM_BMOS_EMBEDDINGS=int8 python benchmarks/step.py --json benchmarks/results/"
    assert f"32 to 84 tokens of context, on Some CPU, 2 threads; {command}" in text
    assert "| lm_head | 50.0 (25%) |" in text
