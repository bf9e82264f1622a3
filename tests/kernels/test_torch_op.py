"""The CPU kernel in torch's dispatcher gives what the same kernel gives through Python."""

import ctypes
import mmap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from tests.kernels import oracle
from vllm_bmos import ops
from vllm_bmos.kernels import LinearConfig, LinearTensors, cpu, torch_op

try:
    cpu.isas()
except OSError as missing:
    pytest.skip(f"the library is not built: {missing}", allow_module_level=True)

SIZES, K, E = (70, 33), 200, 4
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def prepared(dtype: torch.dtype) -> LinearTensors:
    layer = oracle.random_layer(SIZES, K, E)
    config = LinearConfig(K, SIZES, E, dtype, layer.s_in.dtype, "cpu")
    return cpu.CpuKernel().prepare(
        LinearTensors(layer.weight, layer.s_in, layer.s_out, layer.router), config
    )


def arguments(
    x: torch.Tensor, logits: torch.Tensor | None, t: LinearTensors, bias: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    scales = t.in_channel_scale, t.out_channel_scale, t.router_weight
    return (x, logits, t.weight, *scales, bias)


def test_torch_has_the_interface() -> None:
    assert torch_op.register(cpu.library())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_logits", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_same_bits_as_through_python(
    dtype: torch.dtype, with_logits: bool, with_bias: bool
) -> None:
    tensors = prepared(dtype)
    logits = torch.randn(3, 2, E) if with_logits else None
    bias = torch.randn(103).to(dtype) if with_bias else None
    x = torch.randn(3, K).to(dtype)
    for _ in range(3):  # the arguments are given back, so a second call finds them whole
        y = torch.ops.vllm_bmos.cpu_linear(*arguments(x, logits, tensors, bias))
        expected = cpu.CpuKernel().linear(x, logits, tensors, bias, list(SIZES))
        assert y.dtype == dtype and torch.equal(y, expected)


def test_arguments_and_results_are_not_leaked() -> None:
    tensors, bias = prepared(torch.float32), torch.randn(103)
    rows = 2000  # 1.6 MB of x, 0.8 MB of y

    def resident() -> int:
        pages = Path("/proc/self/statm").read_text().split()[1]
        return int(pages) * mmap.PAGESIZE

    def call() -> None:
        x, logits = torch.randn(rows, K), torch.randn(rows, 2, E)
        torch.ops.vllm_bmos.cpu_linear(*arguments(x, logits, tensors, bias))

    for _ in range(5):
        call()
    before = resident()
    for _ in range(60):
        call()
    assert resident() - before < 20 * 2**20  # a leak would take 140 MB


def one_less(tensors: LinearTensors, name: str) -> LinearTensors:
    """With the last column of a tensor cut off."""
    return replace(tensors, **{name: getattr(tensors, name)[..., :-1].contiguous()})


def other_dtype(tensors: LinearTensors) -> LinearTensors:
    """With scales of another dtype than was prepared."""
    weight, *scales = tensors.in_order()
    return LinearTensors(weight, *(scale.double().to(torch.bfloat16) for scale in scales))


def test_bad_arguments_are_refused() -> None:
    tensors, x = prepared(torch.float32), torch.randn(3, K)
    plain = LinearTensors(
        torch.zeros(103, 25, dtype=torch.uint8),
        tensors.in_channel_scale,
        tensors.out_channel_scale,
        tensors.router_weight,
    )
    for call, message in (
        (arguments(x, None, plain, None), "not prepared by this kernel"),
        (arguments(torch.randn(3, K + 1), None, tensors, None), "do not fit together"),
        (arguments(torch.randn(K, 3).T, None, tensors, None), "contiguous"),
        (arguments(torch.randn(K), None, tensors, None), r"expected x\[M, K\]"),
        (arguments(x.double(), None, tensors, None), "float32, float16 or bfloat16"),
        (arguments(x, torch.randn(3, 2, E).half(), tensors, None), "logits must be float32"),
    ):
        with pytest.raises(ValueError, match=message):
            torch.ops.vllm_bmos.cpu_linear(*call)


def test_what_does_not_fit_together_is_refused() -> None:
    tensors, x, logits = prepared(torch.float32), torch.randn(3, K), torch.randn(3, 2, E)
    parts = ("in_channel_scale", "out_channel_scale", "router_weight")
    calls: list[tuple[torch.Tensor, torch.Tensor | None, LinearTensors, torch.Tensor | None]] = [
        (torch.randn(3, K + 1), None, tensors, None),
        (x, logits[:1], tensors, None),
        (x, logits[:, :1].contiguous(), tensors, None),
        (x, None, tensors, torch.randn(50)),
        (x, None, other_dtype(tensors), None),
        *((x, None, one_less(tensors, part), None) for part in parts),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="do not fit together"):
            torch.ops.vllm_bmos.cpu_linear(*arguments(*call))
        with pytest.raises(ValueError, match="do not fit together"):
            cpu.CpuKernel().linear(*call, list(SIZES))
    signs = torch.zeros(102, 25, dtype=torch.uint8)
    config = LinearConfig(K, SIZES, E, torch.float32, torch.float32, "cpu")
    with pytest.raises(ValueError, match="expected signs of 103 outputs, found 102"):
        cpu.CpuKernel().prepare(replace(tensors, weight=signs), config)


def test_op_contract_and_compile() -> None:
    tensors, x = prepared(torch.bfloat16), torch.randn(5, K).bfloat16()
    torch.library.opcheck(torch.ops.vllm_bmos.cpu_linear.default, arguments(x, None, tensors, None))

    @torch.compile(fullgraph=True, dynamic=True)
    def twice(x: torch.Tensor) -> torch.Tensor:
        scales = tensors.in_channel_scale, tensors.out_channel_scale, tensors.router_weight
        return ops.linear(x, None, tensors.weight, *scales, None, list(SIZES), "cpu") * 2

    plain = torch.ops.vllm_bmos.cpu_linear(*arguments(x, None, tensors, None))
    before = counters["stats"]["unique_graphs"]
    assert torch.equal(twice(x), plain * 2)
    assert counters["stats"]["unique_graphs"] == before + 1  # else nothing was compiled


def test_says_why_calls_go_through_python(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    monkeypatch.setattr(torch_op, "FUNCTIONS", ("no_such_function",))
    monkeypatch.setattr(torch_op.logger, "info", lambda text, *values: said.append(text % values))
    assert not torch_op.register(ctypes.CDLL(None))
    assert "no_such_function" in said[0]
