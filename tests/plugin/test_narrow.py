"""Products of weights of 16 and 8 bits, by the library and a part of the weights at a time."""

from types import SimpleNamespace

import pytest
import torch
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.platforms import CpuArchEnum

from vllm_bmos.plugin import embedding, narrow
from vllm_bmos.plugin.int8_embedding import quantize

DTYPES = [torch.bfloat16, torch.float16]
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 1e-5}


@pytest.mark.parametrize("weights", ["dense", "int8"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
@pytest.mark.parametrize("M", [1, narrow.FEW - 1, narrow.FEW])
@pytest.mark.parametrize("N", [7, narrow.ROWS, 2 * narrow.ROWS + 3])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("lacks", [False, True])
def test_it_is_the_product(
    weights: str,
    dtype: torch.dtype,
    M: int,
    N: int,
    with_bias: bool,
    lacks: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(narrow, "lacks_products", lambda _: lacks)
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(size, 100, generator=generator).to(dtype) for size in (M, N))
    bias = torch.randn(N, generator=generator).to(dtype) if with_bias else None
    scale, values = None, weight.double()
    if weights == "int8":
        weight, scale = quantize(weight)
        values = weight.double() * scale.double().unsqueeze(1)
    y = narrow.linear(x, weight, bias, scale)
    wanted = x.double() @ values.T
    wanted += 0 if bias is None else bias.double()
    assert y.dtype == dtype and y.shape == (M, N)
    # 100 products of numbers of size 1; that of bfloat16 itself rounds more on processors with it.
    assert (y.double() - wanted).square().mean().sqrt() < 15 * TOLERANCE[dtype]


def test_tokens_may_come_in_batches() -> None:
    x, weight = torch.randn(2, 3, 32), torch.randn(64, 32)
    assert torch.equal(
        narrow.linear(x, weight), narrow.linear(x.view(6, 32), weight).view(2, 3, 64)
    )


@pytest.mark.parametrize("M", [1, narrow.FEW])
def test_large_sums_do_not_overflow(M: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(narrow, "lacks_products", lambda _: False)
    codes, scale = quantize(torch.full((64, 4096), 1e-3, dtype=torch.float16))
    y = narrow.linear(torch.ones(M, 4096, dtype=torch.float16), codes, None, scale)
    torch.testing.assert_close(y, torch.full_like(y, 4.096), rtol=2e-3, atol=0)


def test_without_the_library_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing() -> None:
        raise OSError("not built")

    monkeypatch.setattr(narrow.cpu, "library", missing)
    monkeypatch.setattr(narrow.logger, "propagate", True)
    narrow.has_library.cache_clear()
    try:
        x, weight, scale = torch.randn(2, 100), torch.randn(30, 100), torch.rand(30)
        torch.testing.assert_close(narrow.linear(x, weight), x @ weight.T)
        torch.testing.assert_close(
            narrow.linear(x, weight, None, scale), x @ weight.T * scale, rtol=1e-4, atol=1e-4
        )
        assert "slow without the CPU kernel's library (not built); install a C++" in caplog.text
    finally:
        narrow.has_library.cache_clear()


X86, ARM = CpuArchEnum.X86, CpuArchEnum.ARM


@pytest.mark.parametrize(
    ("cpu", "architecture", "capability", "found"),
    [
        (True, X86, "AVX2", [True, True, False]),
        (True, X86, "DEFAULT", [True, True, False]),
        (True, X86, "AVX512", [False] * 3),
        (True, X86, "AVX10", [False] * 3),
        (True, ARM, "DEFAULT", [False] * 3),
        (False, X86, "AVX2", [False] * 3),
    ],
)
def test_only_16_bits_without_instructions_for_them(
    monkeypatch: pytest.MonkeyPatch,
    cpu: bool,
    architecture: CpuArchEnum,
    capability: str,
    found: list[bool],
) -> None:
    platform = SimpleNamespace(is_cpu=lambda: cpu, get_cpu_architecture=lambda: architecture)
    monkeypatch.setattr(narrow, "current_platform", platform)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert [narrow.lacks_products(dtype) for dtype in (*DTYPES, torch.float32)] == found


@pytest.mark.parametrize("lacks", [False, True])
def test_a_head_takes_it_there_and_keeps_its_weight(
    monkeypatch: pytest.MonkeyPatch, lacks: bool
) -> None:
    head, table = ParallelLMHead.__new__(ParallelLMHead), torch.nn.Module()
    for layer in (head, table):
        torch.nn.Module.__init__(layer)
        weight = torch.randn(16, 8).bfloat16()
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    chosen: list[torch.nn.Module] = []

    def dispatch(layer: torch.nn.Module, remove_weight: bool) -> None:
        chosen.append(layer)
        layer.cpu_linear = torch.nn.functional.linear  # type: ignore[assignment]

    monkeypatch.setattr(embedding, "lacks_products", lambda dtype: lacks)
    monkeypatch.setattr(embedding, "dispatch_cpu_unquantized_gemm", dispatch)
    method = embedding.LeanEmbeddingMethod()
    method.keep_weight = False
    method.process_weights_after_loading(head)
    x = torch.randn(narrow.FEW, 8).bfloat16()
    assert method.apply(table, x).shape == (narrow.FEW, 16)  # a table that serves as a head
    assert chosen == ([] if lacks else [head, table])
    assert (head.cpu_linear is narrow.linear) == (table.cpu_linear is narrow.linear) == lacks
    assert (table in embedding._packed_of_plain) != lacks
