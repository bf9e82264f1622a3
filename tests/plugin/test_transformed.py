"""Layers that vLLM would fold into others or reorder are refused by name, and no others."""

from types import SimpleNamespace

import pytest

from vllm_bmos.checkpoint import BinaryMosConfig
from vllm_bmos.plugin import transformed
from vllm_bmos.plugin.transformed import refuse_transformed

MLA = "model.layers.0.self_attn.kv_b_proj"


def serve(monkeypatch: pytest.MonkeyPatch, architecture: str, use_mla: bool = False) -> None:
    config = SimpleNamespace(model_config=SimpleNamespace(use_mla=use_mla))
    cls = type("ModelForEmbedding", (type(architecture, (), {}),), {})
    monkeypatch.setattr(transformed, "get_current_vllm_config_or_none", lambda: config)
    monkeypatch.setattr(transformed, "get_model_cls", lambda model: cls)


@pytest.mark.parametrize(("E", "norm"), [(4, None), (1, "layer_norm")])
def test_layers_that_vllm_folds_into_others(
    monkeypatch: pytest.MonkeyPatch, E: int, norm: str | None
) -> None:
    config = BinaryMosConfig(E, (MLA,), output_norm=norm)
    for known in (False, True):
        if known:
            serve(monkeypatch, "DeepseekV3ForCausalLM", use_mla=True)
        with pytest.raises(ValueError, match=r"kv_b_proj: vLLM folds .* --ignore 'kv_b_proj'"):
            refuse_transformed(MLA, MLA, config)
        refuse_transformed(MLA, MLA, BinaryMosConfig(1, (MLA,)))
    serve(monkeypatch, "DeepseekV3ForCausalLM")
    refuse_transformed(MLA, MLA, config)


@pytest.mark.parametrize(
    ("architecture", "reordered", "other"),
    [
        ("BloomForCausalLM", "h.0.self_attention.query_key_value", "h.0.self_attention.dense"),
        ("Llama4ForCausalLM", "layers.0.self_attn.q_proj", "layers.0.self_attn.o_proj"),
        ("TransformersForCausalLM", None, "layers.0.attention.query_key_value"),
        ("LlamaForCausalLM", None, "layers.0.self_attn.q_proj"),
    ],
)
def test_layers_that_a_model_of_vllm_reorders(
    monkeypatch: pytest.MonkeyPatch, architecture: str, reordered: str | None, other: str
) -> None:
    serve(monkeypatch, architecture)
    refuse_transformed(other, other, BinaryMosConfig(1, (other,)))
    if reordered:
        with pytest.raises(ValueError, match=f"{reordered}: vLLM's {architecture} reorders"):
            refuse_transformed(reordered, reordered, BinaryMosConfig(1, (reordered,)))
