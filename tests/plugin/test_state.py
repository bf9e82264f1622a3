"""A sharded state carries the name of the kernel that prepared it."""

from types import SimpleNamespace

import pytest
import torch
from vllm.config import VllmConfig

from vllm_bmos.kernels import kernels
from vllm_bmos.plugin import state
from vllm_bmos.plugin.state import COMPILE_KEY, LAYOUT, SavedLayout


def layer_of(kernel: str) -> tuple[torch.nn.Module, SavedLayout]:
    layer = torch.nn.Linear(2, 2)
    return layer, SavedLayout(layer, kernels()[kernel], "layers.0.o_proj")


@pytest.fixture
def loading(monkeypatch: pytest.MonkeyPatch) -> None:
    load = SimpleNamespace(load_format="sharded_state")
    config = SimpleNamespace(load_config=load, additional_config={})
    monkeypatch.setattr(state, "get_current_vllm_config_or_none", lambda: config)


def test_a_layer_that_reads_a_checkpoint_saves_its_kernel() -> None:
    layer, layout = layer_of("cpu")
    assert not layout.is_loaded
    assert bytes(layer.state_dict()[LAYOUT].tolist()).startswith(b"cpu\0")
    assert LAYOUT not in dict(layer.named_buffers())


@pytest.mark.parametrize("kernel", ["cpu", "reference"])
def test_a_loaded_state_must_be_of_the_same_kernel(kernel: str, loading: None) -> None:
    layer, layout = layer_of(kernel)
    assert layout.is_loaded
    with pytest.raises(ValueError, match=r"saved by kernel ''"):
        layout.check()  # nothing was loaded
    _, source = layer_of("cpu")
    layer.state_dict()[LAYOUT].copy_(source.expected)
    if kernel == "cpu":
        layout.check()
    else:
        with pytest.raises(ValueError, match=r"layers.0.o_proj.*VLLM_BMOS_KERNEL=cpu"):
            layout.check()


def test_compiled_graphs_are_looked_up_by_the_kernels_they_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = VllmConfig()
    monkeypatch.setattr(state, "get_current_vllm_config_or_none", lambda: config)
    hashes = [config.compute_hash()]
    for kernel in ("cpu", "cpu", "reference"):
        layer_of(kernel)
        hashes.append(config.compute_hash())
    assert hashes[1] == hashes[2] and len(set(hashes)) == 3
    assert config.additional_config == {COMPILE_KEY: ["cpu", "reference"]}


def test_a_module_may_hold_several_layers() -> None:
    layer = torch.nn.Linear(2, 2)
    for prefix in ("w13_", "w2_"):
        SavedLayout(layer, kernels()["cpu"], "experts.0.gate_proj", prefix)
    assert {f"w13_{LAYOUT}", f"w2_{LAYOUT}"} < layer.state_dict().keys()
