import json
import os
import subprocess
import sys

import pytest
import serving
from harness import resident_bytes
from make_model import SHAPES
from vllm_bench import Load, weights_seconds

from examples.server import session_pids
from vllm_bmos.plugin.int8_embedding import EMBEDDINGS_ENV

LOG = """\
(Worker pid=7) INFO 11-22 00:59:58 [base_loader.py:82] Initializing model took 0.2 seconds
(Worker pid=7) INFO 11-22 01:00:01 [default_loader.py:501] Loading weights took 2.10 seconds
(Worker pid=7) INFO 11-22 01:00:04 [cpu_model_runner.py:87] Warming up model for the compilation...
"""


def test_seconds_of_loading_and_preparing():
    assert weights_seconds(LOG) == 6
    assert weights_seconds(LOG.splitlines()[0]) is None


def test_memory_of_a_session_holds_its_children():
    script = (
        "import time; held = bytearray(50_000_000); print(len(held), flush=True); time.sleep(60)"
    )
    child = subprocess.Popen(
        ["sh", "-c", f"{sys.executable} -c '{script}'; true"],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert child.stdout is not None
        child.stdout.readline()
        pids = session_pids(child.pid)
        assert len(pids) == 2
        assert 50e6 < resident_bytes(pids) < 100e6
    finally:
        os.killpg(child.pid, 9)
        child.wait()


def test_our_model_is_served_with_embeddings_as_they_are_and_in_8_bits(monkeypatch, tmp_path):
    def measure(model, load, options, work, rates=True, env=None):
        held = {None: 3.0, "": 4.5, "int8": 4.25}[env and env[EMBEDDINGS_ENV]]
        found = {"resident_bytes": held * 1e9, "ready_seconds": 9.0}
        return found | ({"loaded_bytes": held * 1e9 + 1e8, "ttft_ms": 1.0} if rates else {})

    monkeypatch.setattr(serving, "measure_server", measure)
    for make in ("kept_bmos_model", "make_bmos_model"):
        monkeypatch.setattr(serving, make, lambda *_: tmp_path)
    args = serving.parse_args(["--work", str(tmp_path)])
    load = Load([4], 100, 8, threads=1)
    plain, narrow = serving.bench_bmos(SHAPES["llama-7b"], args, load)
    assert (plain["mode"], narrow["mode"]) == ("default", serving.IN_8_BITS)
    assert plain["resident_beyond_vllm_gb"] == 1.5 and narrow["resident_beyond_vllm_gb"] == 1.25
    assert narrow["loaded_beyond_vllm_gb"] == 1.35 and narrow["ttft_ms"] == 1.0


def test_depth_is_extrapolated_linearly(monkeypatch, tmp_path):
    # 10 ms besides the layers and 5 ms a layer; prefill of 100 tokens: 20 ms and 30 ms a layer.
    def measure(model, load, options, work):
        layers = int(model.name.split("-")[2])
        return {
            "decode_tokens_per_s": {"4": 4 / (0.010 + 0.005 * layers)},
            "prefill_tokens_per_s": 100 / (0.020 + 0.030 * layers),
        }

    monkeypatch.setattr(serving, "measure_server", measure)
    arguments = ["--bf16-layers", "2", "6", "--work", str(tmp_path), "--prompt", "100"]
    args = serving.parse_args(arguments)
    row = serving.bench_bf16(SHAPES["llama-7b"], args, Load([4], 100, 8, threads=1))
    assert row["decode_tokens_per_s"]["4"] == pytest.approx(4 / 0.170, abs=0.01)
    assert row["prefill_tokens_per_s"] == pytest.approx(100 / 0.980, abs=0.01)
    assert row["extrapolated_from_layers"] == [2, 6]


def test_what_turns_out_missing_after_the_last_row_is_written(monkeypatch, tmp_path):
    def bench(shape, args, load, missing):
        yield {"provider": "p", "mode": "m", "decode_tokens_per_s": {}, "prefill_tokens_per_s": 1.0}
        missing["llama_cpp q4_0"] = "crashed"

    monkeypatch.setattr(serving, "bench", bench)
    monkeypatch.setattr(serving, "measure_limits", lambda device: {})
    file = tmp_path / "serving.json"
    arguments = ["serving.py", "--json", str(file), "--work", str(tmp_path), "--threads", "1"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert serving.main() == 0
    assert json.loads(file.read_text())["missing"] == {"llama_cpp q4_0": "crashed"}
