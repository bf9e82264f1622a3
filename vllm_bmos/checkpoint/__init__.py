"""The packed BinaryMoS checkpoint: the format, its validation, reading and writing.

Nothing here imports vLLM or transformers.
"""

from vllm_bmos.checkpoint.format import (
    FORMAT_VERSION,
    QUANT_METHOD,
    BinaryMosConfig,
    FormatError,
    linear_specs,
)
from vllm_bmos.checkpoint.reader import Checkpoint
from vllm_bmos.checkpoint.signs import pack_signs, unpack_signs

__all__ = [
    "FORMAT_VERSION",
    "QUANT_METHOD",
    "BinaryMosConfig",
    "Checkpoint",
    "FormatError",
    "linear_specs",
    "pack_signs",
    "unpack_signs",
]
