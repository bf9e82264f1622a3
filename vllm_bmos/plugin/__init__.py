"""What vLLM sees. `register` is the entry point `vllm.general_plugins: vllm_bmos`.

vLLM calls it in every process it starts, more than once at times, and only logs what it raises: so
it is idempotent, cheap, and turns an unsupported vLLM into an error that a user reads.
"""

import logging
import os
from functools import partial

from vllm_bmos.checkpoint.format import QUANT_METHOD


def register() -> None:
    """Make `quant_method: binarymos` known to this process's vLLM."""
    from vllm.model_executor.layers.quantization import (
        QUANTIZATION_METHODS,
        register_quantization_config,
    )

    if QUANT_METHOD in QUANTIZATION_METHODS:
        return

    # vLLM configures the handlers and level of its own logger only, and may do so again later.
    logging.getLogger("vllm_bmos").parent = logging.getLogger("vllm")

    from vllm_bmos.plugin.versions import refusing_config, unsupported_vllm

    reason = unsupported_vllm()
    if reason is not None:
        register_quantization_config(QUANT_METHOD)(refusing_config(reason))
        return

    # vLLM warns of variables that it does not know, or stops (--fail-on-environ-validation). Of
    # those it knows, compiled graphs depend on the values, and Ray's workers get them.
    from vllm.envs import environment_variables

    from vllm_bmos.kernels import ENVIRONMENT
    from vllm_bmos.plugin.config import BinaryMosVllmConfig
    from vllm_bmos.plugin.int8_embedding import EMBEDDINGS_ENV

    for name in (*ENVIRONMENT, EMBEDDINGS_ENV):
        environment_variables.setdefault(name, partial(os.environ.get, name))

    register_quantization_config(QUANT_METHOD)(BinaryMosVllmConfig)
