"""A model that cannot fit is refused with numbers; what the warm-up freed is given back."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.engine.compare import vllm_answers
from tests.tiny import make_packed
from vllm_bmos.plugin import config, embedding
from vllm_bmos.plugin.memory import available_bytes, check_memory

# Prints how far above its start the memory of the process is: with 200 MB of blocks, after freeing
# all but the last, which keeps the heap, and after giving back.
FREES = """
import mmap
from pathlib import Path
from vllm_bmos.plugin.memory import give_back_freed
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
start = resident()
blocks = [b"x" * 100_000 for _ in range(2000)]
print(resident() - start)
last = blocks[-1]
del blocks
print(resident() - start)
assert give_back_freed()
print(resident() - start)
"""


def test_a_model_that_is_too_large_is_refused_with_both_numbers() -> None:
    with pytest.raises(
        ValueError, match=r"weights take 3 GB on this machine.* 2\.5 GB of memory are"
    ):
        check_memory(3 * 10**9, available=25 * 10**8)
    check_memory(2 * 10**9, available=25 * 10**8)
    check_memory(3 * 10**9, available=None)


@pytest.mark.parametrize(
    ("limit", "expected"), [(None, 8192 * 1024), ("max", 8192 * 1024), ("5000000", 4000000)]
)
def test_a_container_has_what_its_limit_leaves(
    limit: str | None, expected: int, tmp_path: Path
) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9999 kB\nMemAvailable: 8192 kB\n")
    if limit is not None:
        group = tmp_path / "sys/fs/cgroup"
        group.mkdir(parents=True)
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.stat").write_text("anon 1000000\nfile 3000000\n")
    assert available_bytes(tmp_path) == expected


def test_an_unknown_system_says_nothing(tmp_path: Path) -> None:
    assert available_bytes(tmp_path) is None


def test_freed_memory_goes_back_to_the_system() -> None:
    """In a process of its own, as a test runner's heap is full of other things."""
    run = subprocess.run([sys.executable, "-c", FREES], capture_output=True, text=True, check=True)
    held, freed, given_back = map(int, run.stdout.split())
    assert held > 150e6 and freed > held / 2
    assert given_back < held / 4


def test_the_first_logits_give_back_what_the_warm_up_left(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(embedding, "give_back_freed", lambda: calls.append(1))
    monkeypatch.setattr(embedding.UnquantizedEmbeddingMethod, "apply", lambda *_: "logits")
    method, head = embedding.LeanEmbeddingMethod(), torch.nn.Module()
    head.cpu_linear = None  # type: ignore[assignment]
    assert [method.apply(head, torch.zeros(1)) for _ in range(3)] == ["logits"] * 3
    assert calls == [1]


def test_a_reload_forgets_what_was_packed_of_the_old_weights() -> None:
    method, table, tied = embedding.LeanEmbeddingMethod(), torch.nn.Module(), torch.nn.Module()
    for layer in (table, tied):
        layer.cpu_linear = lambda *_: None  # type: ignore[assignment]
    embedding._packed_of_plain.add(tied)
    for _ in range(2):
        method.process_weights_after_loading(table)
        assert not hasattr(table, "cpu_linear") and not hasattr(tied, "cpu_linear")


@pytest.mark.slow
@pytest.mark.feature(
    "Faults",
    "a model larger than the memory that is available (CPU)",
    against="refused at load, with what is needed and what there is",
)
def test_the_engine_refuses_it_at_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_packed("llama", tmp_path)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # so that what is patched is used
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setattr(config, "available_bytes", lambda: 1000)
    with pytest.raises(ValueError, match=r"The weights take .* GB on this machine"):
        vllm_answers(path, "float32", max_model_len=64)
