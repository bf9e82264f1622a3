"""Which layers of a model are quantized: the linear layers inside its decoder blocks."""

import re
from collections.abc import Mapping
from typing import Any

import torch

from converters.moe import expert_shapes, is_experts
from vllm_bmos.checkpoint.format import FormatError, TensorSpec

# Blocks are numbered. What lies outside them (embeddings, heads, projections) stays dense.
IN_BLOCK = re.compile(r"\.\d+\.")
# Layers that decide between others: tiny, and too sensitive for one bit. Those of MoE blocks
# choose experts; Gemma 3n's altup mixes its streams.
ROUTING = re.compile(r"\.(gate|router|router\.proj|shared_expert_gate|altup\.\w+)$")
# What Mixtral's files call the block that transformers calls mlp.
MOE_BLOCKS = (".mlp.", ".block_sparse_moe.")
FLOAT_TAG = "__float__"


def decoder_linears(
    model_config: Mapping[str, Any], specs: Mapping[str, TensorSpec]
) -> dict[str, tuple[int, int]]:
    """The linear layers inside the decoder blocks, as the source's files name them.

    The model is built by transformers on the meta device: no weight is allocated and no code from
    the model's directory runs.

    Args:
        model_config: config.json.
        specs: every tensor of the source.

    Returns:
        (N, K) by module name, in the model's order.

    Raises:
        FormatError: if transformers does not know the model, or a layer's weight is missing or has
            another shape than config.json says.
    """
    model = meta_model(model_config, len(specs))
    decoder = set(model.get_decoder().modules())  # leaves the vision tower of a larger model out
    found: dict[str, tuple[int, int]] = {}
    prefix = model.base_model_prefix
    for name, module in model.named_modules():
        if module not in decoder or not IN_BLOCK.search(name) or ROUTING.search(name):
            continue
        if isinstance(module, torch.nn.Linear):
            on_disk = _name_on_disk(name, prefix, specs)
            found[on_disk] = module.out_features, module.in_features
        elif is_experts(module):
            paths = [
                path.replace(MOE_BLOCKS[0], block)
                for path in (name, name.removeprefix(f"{prefix}."))
                for block in MOE_BLOCKS
            ]
            found |= expert_shapes(module, paths, specs)
    for name, shape in found.items():
        weight = specs.get(f"{name}.weight")
        if weight is None or weight.shape != shape:
            raise FormatError(
                f"{name}.weight: config.json asks for {list(shape)}, found {weight or 'none'}. "
                "Config and weights are of different models, or the source is incomplete."
            )
    return found


def meta_model(model_config: Mapping[str, Any], tensors: int) -> Any:
    """The transformers model of a config, without weights.

    Args:
        model_config: config.json.
        tensors: number of tensors in the source; no model has more blocks than that.

    Raises:
        FormatError: if transformers cannot build it.
    """
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = model_config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise FormatError(
            f"config.json: model_type: transformers does not know {model_type!r}. Upgrade "
            "transformers; models that bring their own code are not supported."
        )
    layers = model_config.get("num_hidden_layers", 0)
    if not isinstance(layers, int) or layers > tensors:
        raise FormatError(
            f"config.json: num_hidden_layers is {layers!r}, but the model has {tensors} tensors."
        )
    given = {key: v for key, v in model_config.items() if key != "quantization_config"}
    try:
        values = _plain_floats(given)
        config = CONFIG_MAPPING[model_type].from_dict(values)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever transformers makes of a malformed config
        raise FormatError(
            f"config.json: transformers cannot build this {model_type} model "
            f"({type(error).__name__}: {error})."
        ) from None


def _plain_floats(value: Any) -> Any:
    """Any JSON with the floats that transformers writes as {"__float__": "Infinity"}, say."""
    if isinstance(value, dict):
        if value.keys() == {FLOAT_TAG}:
            return float(value[FLOAT_TAG])
        return {key: _plain_floats(inner) for key, inner in value.items()}
    return [_plain_floats(inner) for inner in value] if isinstance(value, list) else value


def _name_on_disk(name: str, prefix: str, specs: Mapping[str, TensorSpec]) -> str:
    """Some checkpoints were saved from the base model and lack its prefix."""
    short = name.removeprefix(f"{prefix}.")
    for candidate in (name, short):
        if f"{candidate}.weight" in specs:
            return candidate
    raise FormatError(
        f"{name}.weight is missing: config.json asks for it. The source is incomplete, or "
        "config.json belongs to another model; download it again."
    )
