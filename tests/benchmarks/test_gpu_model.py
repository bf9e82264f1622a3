"""The model of GPUs takes the measurements that it can be compared with, and no others."""

import json
import sys
from pathlib import Path
from typing import Any

import gpu_model
import pytest

ROW = {"K": 64, "N": 64, "M": 1, "E": 4, "dtype": "float16", "layer_us": 2.0, "kernels_us": {}}
GOOD = {"machine": {"gpu": "NVIDIA H200"}, "rows": [ROW]}


def test_a_result_of_gpu_parts_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "parts.json"
    path.write_text(json.dumps(GOOD))
    assert gpu_model.parts_of(path) == GOOD


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"machine": {"gpu": "NVIDIA T4"}}, "machine.gpu: expected one of .*'NVIDIA T4'"),
        ({"machine": {}}, "machine.gpu: .*found None"),
        ({"machine": None}, "expected a result of gpu_parts.py, with machine and rows"),
        ({"rows": None}, "expected a result of gpu_parts.py, with machine and rows"),
        ({"rows": []}, "rows: expected one at least"),
        ({"rows": ["x"]}, r"rows\[0\]: expected a row of gpu_parts"),
        ({"rows": [ROW, {"K": 64, "median_us": 1.0}]}, r"rows\[1\]: expected a row of gpu_parts"),
        ({"rows": [ROW | {"E": 1}]}, "expected E = 4 and float16, found E = 1 and float16"),
        ({"rows": [ROW | {"dtype": "bfloat16"}]}, "found E = 4 and bfloat16"),
    ],
)
def test_other_results_are_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = tmp_path / "parts.json"
    path.write_text(json.dumps(GOOD | change))
    with pytest.raises(ValueError, match=said):
        gpu_model.parts_of(path)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--M", "4"], "leave one of them out"),
        ([], "has the model alone; give another --json"),
        (["--json", "x.json"], "No such file"),
    ],
)
def test_flags_are_refused_before_the_model(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    extra: list[str],
    said: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_model.py", "--measured", str(tmp_path / "no"), *extra])
    monkeypatch.setattr(gpu_model, "start", lambda threads: None)
    with pytest.raises(SystemExit):
        gpu_model.main()
    assert said in capsys.readouterr().err
