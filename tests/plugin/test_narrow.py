"""Products of 16-bit weights in float32, a part of the weights at a time."""

from types import SimpleNamespace

import pytest
import torch
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.platforms import CpuArchEnum

from vllm_bmos.plugin import embedding, narrow

DTYPES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [1, narrow.FEW - 1, narrow.FEW, 33])
@pytest.mark.parametrize("N", [1, narrow.ROWS, 2 * narrow.ROWS + 3])
@pytest.mark.parametrize("with_bias", [False, True])
def test_it_is_the_product(dtype: torch.dtype, M: int, N: int, with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(size, 100, generator=generator).to(dtype) for size in (M, N))
    bias = torch.randn(N, generator=generator).to(dtype) if with_bias else None
    y = narrow.linear(x, weight, bias)
    wanted = x.double() @ weight.double().T
    wanted += 0 if bias is None else bias.double()
    assert y.dtype == dtype and y.shape == (M, N)
    error = (y.double() - wanted).norm() / wanted.norm()
    assert error < (4e-3 if dtype == torch.bfloat16 else 6e-4)


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
