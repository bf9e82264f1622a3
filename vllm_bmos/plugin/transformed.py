"""Layers whose tensors vLLM transforms by rules that do not know packed ones; they are refused."""

import re

from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.model_loader.utils import get_model_cls

from vllm_bmos.checkpoint import BinaryMosConfig

# The layer of multi-head latent attention that vLLM multiplies into its neighbours.
ABSORBED = "kv_b_proj"
# The layers whose rows a model of vLLM puts in another order as it loads them: by the model's class
# in vLLM, regular expressions of what is to be ignored.
REORDERED = {
    "BloomForCausalLM": r"\.query_key_value$",
    "GPTNeoXForCausalLM": r"\.query_key_value$",  # of vLLM 0.28; later it is transformers' model
    "Llama4ForCausalLM": r"\.self_attn\.[qkv]_proj$",
    "Llama4ForConditionalGeneration": r"\.self_attn\.[qkv]_proj$",
}


def refuse_transformed(prefix: str, name: str, config: BinaryMosConfig) -> None:
    """Raise ValueError if vLLM would transform a quantized layer, or stop in the attempt.

    Args:
        prefix: the layer by vLLM's name.
        name: the layer, or its first shard, by the checkpoint's name.
        config: the checkpoint's quantization config.
    """
    vllm_config = get_current_vllm_config_or_none()
    model = None if vllm_config is None else vllm_config.model_config
    if prefix.rpartition(".")[2] == ABSORBED and (model is None or model.use_mla):
        # vLLM takes this layer's weight out of it by running it on a unit matrix, whose rows would
        # have gates of their own.
        if config.num_experts > 1 or config.output_norm:
            raise ValueError(
                f"{name}: vLLM folds this layer of multi-head latent attention into others, which "
                "is wrong for scales or a norm that depend on the token. Convert the model again "
                f"with --ignore '{ABSORBED}', or with --experts 1."
            )
    # A pooling model is of a class derived from the language model's.
    classes = [] if model is None else [cls.__name__ for cls in get_model_cls(model).__mro__]
    for architecture in classes:
        pattern = REORDERED.get(architecture)
        if pattern and re.search(pattern, name):
            raise ValueError(
                f"{name}: vLLM's {architecture} reorders the rows of this layer's tensors as it "
                "loads them, and not as packed ones need it. Convert the model again with "
                f"--ignore '{pattern}'."
            )
