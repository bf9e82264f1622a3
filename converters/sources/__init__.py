"""The kinds of source, one file each, and the detection of a source's kind."""

from pathlib import Path

from converters.options import Options
from converters.sources.base import Source
from converters.sources.dense import DenseSource
from converters.sources.gguf import GgufSource
from converters.sources.official import OfficialSource
from converters.sources.onebit import OneBitSource
from converters.sources.store import open_directory
from vllm_bmos.checkpoint.format import CONFIG_FILE, QUANT_METHOD, FormatError
from vllm_bmos.checkpoint.reader import read_json

__all__ = ["Source", "open_source"]


def open_source(path: Path, options: Options) -> Source:
    """Detect the kind of a source and open it; reads JSON files and headers only.

    Raises:
        FormatError: in a sentence that names what is missing or wrong.
    """
    if path.suffix == ".gguf":
        return GgufSource(path, options)
    if not path.is_dir():
        raise FormatError(
            f"{path} is neither a directory nor a .gguf file. Download the model first."
        )
    config = read_json(path / CONFIG_FILE)
    quantization = config.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        if method == QUANT_METHOD:
            raise FormatError(f"{path} is a packed BinaryMoS checkpoint already.")
        raise FormatError(
            f"{path / CONFIG_FILE}: the source is quantized by {method!r}. Convert the dense "
            "model that it was made from."
        )
    store = open_directory(path)
    if OneBitSource.recognises(store):
        return OneBitSource(path, options, config, store)
    if OfficialSource.recognises(store):
        return OfficialSource(path, options, config, store)
    return DenseSource(path, options, config, store)
