"""Which layers of a model are quantized: the linear layers inside its decoder blocks."""

import re
from collections.abc import Container, Mapping
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
# What families call their number of blocks.
BLOCK_COUNTS = (
    *("num_hidden_layers", "num_layers", "n_layer", "n_layers"),
    *("encoder_layers", "decoder_layers"),
)


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
    stored = {name.removesuffix(".weight") for name in specs if name.endswith(".weight")}
    for name, module in model.named_modules():
        if module not in decoder or not IN_BLOCK.search(name) or ROUTING.search(name):
            continue
        if isinstance(module, torch.nn.Linear):
            disk = name_on_disk(name, prefix, stored)
            if disk is None:
                raise FormatError(
                    f"{name}.weight is missing: config.json asks for it. The source is incomplete, "
                    "or config.json belongs to another model; download it again."
                )
            found[disk] = module.out_features, module.in_features
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


def meta_model(model_config: Mapping[str, Any], tensors: int, buffers: bool = False) -> Any:
    """The transformers model of a config, without weights.

    Args:
        model_config: config.json.
        tensors: number of tensors in the source; no model has more blocks than that.
        buffers: whether buffers are real; the model is float32 then, whatever the config says.

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
    given = {key: v for key, v in model_config.items() if key != "quantization_config"}
    try:
        _check_counts(given, tensors)
        values = _plain_floats(given)
        config = CONFIG_MAPPING[model_type].from_dict(values)
        if buffers:
            from accelerate import init_empty_weights  # type: ignore[import-untyped]

            with init_empty_weights(include_buffers=False):
                return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except FormatError:
        raise
    except Exception as error:  # whatever transformers makes of a malformed config
        raise FormatError(
            f"config.json: transformers cannot build this {model_type} model "
            f"({type(error).__name__}: {error})."
        ) from None


def _check_counts(config: Mapping[str, Any], tensors: int) -> None:
    """Raise FormatError if a config, or one inside it, asks for more blocks than tensors."""
    for key, value in config.items():
        if isinstance(value, dict):
            _check_counts(value, tensors)
        elif key in BLOCK_COUNTS and not (isinstance(value, int) and value <= tensors):
            raise FormatError(
                f"config.json: {key} is {value!r}, but the model has {tensors} tensors."
            )


def _plain_floats(value: Any) -> Any:
    """Any JSON with the floats that transformers writes as {"__float__": "Infinity"}, say."""
    if isinstance(value, dict):
        if value.keys() == {FLOAT_TAG}:
            return float(value[FLOAT_TAG])
        return {key: _plain_floats(inner) for key, inner in value.items()}
    return [_plain_floats(inner) for inner in value] if isinstance(value, list) else value


def name_on_disk(module: str, prefix: str, stored: Container[str]) -> str | None:
    """What the files call a module: some were saved from the base model and lack its prefix.

    Args:
        module: its name in the model.
        prefix: the model's `base_model_prefix`.
        stored: the files' names of modules.
    """
    short = module.removeprefix(f"{prefix}.")
    return next((name for name in (module, short) if name in stored), None)
