"""The size that the memory table predicts is the size that the converter writes."""

import sys
from pathlib import Path

import pytest

from converters.options import Options
from converters.pipeline import convert
from converters.plan import make_plan
from tests.converters.models import make_official

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "benchmarks"))
import memory


def test_packed_bytes(tmp_path, monkeypatch):
    source = make_official(tmp_path / "source", "small")
    convert(make_plan(source, Options()), tmp_path / "target")
    monkeypatch.setitem(memory.MODELS, "small", (512, 1376, 8, 8, 8, 64, 2000))
    row = memory.measured(tmp_path / "target")
    assert memory.packed_bytes("small") == pytest.approx(row["directory_bytes"], rel=0.005)
    # At K % 8 == 0 the paper's count is exact: no byte is lost to padding.
    assert memory.formula_bytes("small")["BinaryMoS"] == row["tensor_bytes"]


def test_the_papers_figures_are_met_or_beaten():
    for model, paper in memory.PAPER_GB.items():
        assert memory.packed_bytes(model) / memory.GB <= paper["BinaryMoS"]
