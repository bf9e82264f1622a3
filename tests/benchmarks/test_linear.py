import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import linear
import pytest
import torch
from peers import Loaded, LoadedLayers, Mode, Peer, Weights
from timing import CpuTimer

SCRIPT = Path(linear.__file__)
ROW_KEYS = {
    *("provider", "mode", "K", "N", "M", "E", "dtype", "weights"),
    *("median_us", "p10_us", "p90_us", "samples", "relative_error"),
    *("bits", "arithmetic", "gbs", "read_percent", "gflops", "arithmetic_percent"),
}


class Broken(Peer):
    """Gets one output of the last copy wrong."""

    name = "broken"

    def unavailable(self) -> str | None:
        return None

    def modes(self, weights: Weights) -> list[Mode]:
        return [Mode("float32", "fp32", 1e-5, 32)]

    def load(self, weights: Weights, mode: Mode, copies: int, E: int) -> Loaded:
        wrong = weights.dense.clone()
        wrong[-1, -1] *= -1
        dense = [weights.dense] * (copies - 1) + [wrong]
        return LoadedLayers([lambda x, w=w: x @ w.T for w in dense])


def test_command_line_writes_rows_and_plot(tmp_path: Path):
    file = tmp_path / "linear.json"
    options = ["--shapes", "tiny", "100x37", "--M", "1", "3", "--rounds", "1", "--dtype", "float32"]
    options += ["--providers", "vllm_bmos", "torch", "gemlite", "--json", str(file)]
    run = subprocess.run(
        [sys.executable, str(SCRIPT), *options],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(file.read_text())
    assert {"cpu", "threads", "versions", "commit", "limits"} <= result["machine"].keys()
    assert list(result["missing"]) == ["gemlite"]
    rows = result["rows"]
    assert all(set(row) == ROW_KEYS for row in rows)
    for K, N in ((256, 192), (100, 37)):
        for M in (1, 3):
            here = [r for r in rows if (r["K"], r["N"], r["M"]) == (K, N, M)]
            cases = {(r["provider"], r["mode"], r["E"], r["weights"]) for r in here}
            for weights in ("cold", "hot"):
                assert ("vllm_bmos", "default", 4, weights) in cases
                assert ("vllm_bmos", "default", 1, weights) in cases
                assert ("torch", "float32", 0, weights) in cases
    assert len(result["mixing"]) == 8  # 2 shapes, 2 M, cold and hot
    if find_spec("matplotlib"):  # which is optional
        assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "K=100 N=37" in run.stdout


def test_wrong_result_is_reported_and_not_timed():
    weights = Weights.random(64, 48, torch.float32, "cpu")
    wrong: list[str] = []
    args = linear.parse_args(["--M", "2", "--rounds", "1"])
    rows = list(linear.bench_shape(weights, [Broken()], args, CpuTimer(), wrong))
    assert [row["weights"] for row in rows] == ["hot"]  # the first copy is right
    assert len(wrong) == 1
    assert "broken:float32 K=64 N=48 M=2" in wrong[0]


def test_nan_is_wrong():
    weights = Weights.random(16, 8, torch.float32, "cpu")
    ring = LoadedLayers([lambda x: x @ weights.dense.T * float("nan")]).ring(
        weights.activations(1), hot=True
    )
    truth = weights.product_truth(weights.activations(1))
    assert linear.relative_error(ring, truth) == float("inf")


def test_rates():
    row = {"M": 2, "N": 1000, "K": 4000, "E": 0, "bits": 8, "dtype": "bfloat16"}
    row |= {"arithmetic": "int8", "median_us": 100.0}
    limits = {"read_gbs": 80.0, "int8_gops": 1600.0}
    found = linear.rates(row, limits)
    assert found["gflops"] == 160.0
    assert found["arithmetic_percent"] == 10.0
    assert found["gbs"] == pytest.approx((4e6 + 2 * 2 * 5000) / 100e-6 / 1e9, abs=0.01)
    assert found["read_percent"] == pytest.approx(50.2, abs=0.1)


def test_mixing_overhead_compares_the_same_place():
    row = {"provider": "vllm_bmos", "mode": "default", "K": 8, "N": 8, "M": 1}
    rows = [
        {**row, "weights": "cold", "E": 4, "median_us": 110.0},
        {**row, "weights": "cold", "E": 1, "median_us": 100.0},
        {**row, "weights": "hot", "E": 1, "median_us": 10.0},
    ]
    (found,) = linear.mixing_overhead(rows, 4)
    assert (found["weights"], found["overhead_percent"]) == ("cold", 10.0)


def test_shapes():
    assert linear.parse_shape("3x5") == [(3, 5)]
    assert len(linear.parse_shape("llama-7b")) == 3
    for bad in ("llama-9b", "0x5", "3x", "3x5x7"):
        with pytest.raises(ValueError, match="--shapes"):
            linear.parse_shape(bad)


def test_quick_is_two_shapes():
    args = linear.parse_args(["--quick"])
    assert args.shapes == [(4096, 4096), (4096, 11008)]
    assert args.M == [1, 512]
