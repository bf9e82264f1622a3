from typing import Any

from bars import linear_bars, serving_bars


def row(provider: str, mode: str, E: int, M: int, us: float) -> dict[str, Any]:
    shape = {"K": 4096, "N": 4096, "M": M, "E": E, "weights": "cold"}
    return {"provider": provider, "mode": mode, **shape, "median_us": us, "read_percent": 71.0}


def test_linear_bars():
    rows = [
        *(row("vllm_bmos", mode, 4, 1, 60.0) for mode in ("default", "int8")),
        *(row("vllm_bmos", mode, 4, 512, us) for mode, us in (("default", 90.0), ("int8", 60.0))),
        row("vllm_bf16", "bfloat16", 0, 1, 600.0),
        row("vllm_bf16", "bfloat16", 0, 512, 100.0),
    ]
    place = {"M": 1, "weights": "cold"}
    mixing = [place | {"overhead_percent": 4.0}, place | {"overhead_percent": 6.0}]
    bars = {
        what: (measured, met)
        for what, _, measured, met in linear_bars({"rows": rows, "mixing": mixing})
    }
    assert bars == {
        "M=1 cold, over vLLM bf16": ("4096x4096: 10.0", True),
        "M=1 cold 4096x4096": ("60 us", False),
        "M=1 cold, % of the read rate": ("4096x4096: 71", True),
        "E=4 over E=1, M=1": ("at most 6.0 %", False),
        "M=512 default, over vLLM bf16": ("at least 1.11", True),
        "M=512 int8, over vLLM bf16": ("at least 1.67", False),
    }


def test_serving_bars():
    ours = {
        **{"provider": "vllm_bmos", "mode": "default", "decode_tokens_per_s": {"1": 30.0}},
        **{"prefill_tokens_per_s": 50.0, "resident_beyond_vllm_gb": 1.6, "weights_seconds": 11.0},
    }
    dense = {
        **{"provider": "vllm_bf16", "mode": "bfloat16", "decode_tokens_per_s": {"1": 5.0}},
        "prefill_tokens_per_s": 60.0,
    }
    met = {what: met for what, _, _, met in serving_bars({"rows": [ours, dense]})}
    assert met == {
        "7B decode, batch 1": True,
        "over vllm_bf16 bfloat16": False,
        "7B prefill 512": False,
        "memory beyond vLLM and KV cache": True,
        "weights read and laid out": False,
    }
