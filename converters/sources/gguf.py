"""A GGUF file of a dense model, dequantised tensor by tensor.

transformers maps GGUF's metadata, names and layouts (llama.cpp permutes the rows of q and k, and
adds 1 to Gemma's norms) to its own; this file only keeps that from loading the model whole.
"""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from converters.moe import IN_EXPERTS
from converters.options import Options
from converters.sources.base import tensor_bytes
from converters.sources.dense import DenseSource
from converters.structure import meta_model
from vllm_bmos.checkpoint.format import SAFETENSORS_DTYPES, FormatError, TensorSpec

# GGUF's quantized blocks have no Hugging Face dtype. bfloat16 is what most models were trained in.
DTYPE = torch.bfloat16
# Embeddings and head, by far the largest tensors of a small model, keep their rows where they are.
ROW_BY_ROW = ("token_embd.weight", "output.weight")
BLOCK_ROWS = 1024
# Byte-level tokenizers that begin texts with BOS in llama.cpp where a file does not say.
BEGIN_WITH_BOS = (
    *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    *("tekken", "chameleon"),
)


class GgufSource(DenseSource):
    """A GGUF file of an architecture that transformers can read."""

    kind = "gguf"

    def __init__(self, path: Path, options: Options) -> None:
        if not path.is_file():
            raise FormatError(f"{path} is missing. Check the file's name.")
        store, config, self.license = open_gguf(path)
        super().__init__(path, options, config, store)


class GgufStore:
    """The tensors of a GGUF file under their Hugging Face names, as bfloat16."""

    def __init__(
        self, path: Path, tensors: dict[str, Any], processor: Any, names: dict[str, str]
    ) -> None:
        self.files = [path]
        self._tensors = tensors  # by Hugging Face name
        self._processor = processor
        self._names = names  # GGUF name -> Hugging Face name
        # GGUF lists dimensions from the fastest to the slowest.
        self.specs = {
            name: TensorSpec(SAFETENSORS_DTYPES[DTYPE], tuple(int(d) for d in t.shape[::-1]))
            for name, t in tensors.items()
        }

    def tensor(self, name: str) -> torch.Tensor:
        """Dequantise a whole tensor: a matrix by blocks of rows, so that float32 is short-lived."""
        from gguf import dequantize

        stored = self._tensors[name]
        if stored.data.ndim != 2:  # llama.cpp changes values of vectors: Gemma's norms
            values = self._placed(stored, dequantize(stored.data, stored.tensor_type))
            return torch.from_numpy(values).to(DTYPE)
        blocks = [self._rows(stored, start) for start in range(0, len(stored.data), BLOCK_ROWS)]
        bits = torch.cat(blocks).view(torch.int16).numpy()  # numpy has no bfloat16
        return torch.from_numpy(self._placed(stored, bits)).view(DTYPE)

    def _rows(self, stored: Any, start: int) -> torch.Tensor:
        """Some rows of a matrix, dequantised."""
        from gguf import dequantize

        data = stored.data[start : start + BLOCK_ROWS]
        return torch.from_numpy(dequantize(data, stored.tensor_type)).to(DTYPE)

    def _placed(self, stored: Any, values: Any) -> Any:
        """Values in transformers' order and meaning."""
        result = self._processor.process(
            weights=values, name=stored.name, tensor_key_mapping=self._names, parsed_parameters={}
        )
        return np.array(result.weights, order="C")

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """The whole tensor: its layout may permute rows."""
        yield self.tensor(name)

    def chunks(self, name: str) -> Iterator[memoryview]:
        """The bytes of the dequantised tensor; the largest ones in blocks of rows."""
        stored = self._tensors[name]
        if stored.name not in ROW_BY_ROW:
            yield tensor_bytes(self.tensor(name))
            return
        for start in range(0, len(stored.data), BLOCK_ROWS):
            yield tensor_bytes(self._rows(stored, start))


def open_gguf(path: Path) -> tuple[GgufStore, dict[str, Any], str | None]:
    """Read a GGUF file's metadata.

    Returns:
        Its tensors, a config.json for them, and the licence that it names.

    Raises:
        FormatError: if the file is damaged or transformers does not know its architecture.
    """
    from gguf import GGUFReader
    from transformers import AutoConfig
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
        load_gguf_checkpoint,
    )

    try:
        parsed = load_gguf_checkpoint(str(path))
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        reader = GGUFReader(path)
        architecture = reader.fields["general.architecture"].contents()
        processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=parsed["config"])
        model_config = clean_config(config.to_diff_dict())
        model = meta_model(model_config, len(reader.tensors))
        names = get_gguf_hf_weights_map(model, processor)
    except FormatError:
        raise
    except Exception as error:  # whatever the readers make of a malformed file
        raise _unreadable(path, error) from None
    model_config["architectures"] = [type(model).__name__]
    tensors = {names[t.name]: t for t in reader.tensors if t.name in names}
    missing = [hf for gguf, hf in names.items() if hf not in tensors and gguf != "output.weight"]
    if missing:
        raise FormatError(
            f"{path}: {missing[0]} is missing. "
            + (
                "Mixtures of experts are not read from GGUF; convert the model's directory."
                if IN_EXPERTS.search(f"{missing[0]}.")
                else "The file is incomplete."
            )
        )
    lost = _lost(reader, architecture, names, parsed["config"])
    if lost:
        raise FormatError(
            f"{path}: {lost}: transformers does not read this from GGUF, so the result would be "
            "another model. Convert the model's Hugging Face directory instead."
        )
    license_field = reader.fields.get("general.license")
    license_name = license_field.contents() if license_field else None
    return GgufStore(path, tensors, processor, names), model_config, license_name


def _unreadable(path: Path, error: Exception) -> FormatError:
    return FormatError(
        f"{path} cannot be read as GGUF ({type(error).__name__}: {error}). It is damaged, or "
        "transformers does not support its architecture or tokenizer."
    )


def _lost(
    reader: Any, architecture: str, names: dict[str, str], config: dict[str, Any]
) -> str | None:
    """The first thing in a file that transformers would leave out, or None."""
    for tensor in reader.tensors:  # Llama 3.1 has its rotary scaling in one
        if tensor.name not in names:
            return str(tensor.name)
    for name, field in reader.fields.items():
        scaling = name.startswith(f"{architecture}.rope.scaling.")
        if scaling and not (name.endswith(".type") and field.contents() == "none"):
            return str(name)
    if architecture == "llama" and config.get("num_key_value_heads") is None:
        return "attention.head_count_kv is missing, without which rows of q and k are misplaced"
    return None


def clean_config(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json from what transformers reads of GGUF's metadata.

    GGUF stores float32, so 1e-5 arrives as 9.99999974e-06: each float becomes the shortest decimal
    that reads back as the same float32.
    """
    config = json.loads(json.dumps(config), parse_float=lambda text: float(str(np.float32(text))))
    for key in ("_name_or_path", "_model_name_or_path", "quantization_config", "torch_dtype"):
        config.pop(key, None)
    return {**config, "dtype": str(DTYPE).removeprefix("torch.")}


def begins_with_bos(reader: Any) -> bool:
    """Whether a GGUF file wants every text to begin with BOS; if silent, by llama.cpp's rules."""

    def said(key: str) -> Any:
        field = reader.fields.get(f"tokenizer.ggml.{key}")
        return field.contents() if field else None

    if said("add_bos_token") is not None:
        return bool(said("add_bos_token"))
    return said("model") == "llama" or said("pre") in BEGIN_WITH_BOS


def made_files(path: Path, config: dict[str, Any]) -> dict[str, bytes]:
    """The tokenizer, chat template and special tokens inside a GGUF file, as Hugging Face files."""
    from gguf import GGUFReader
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        try:
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        except Exception as error:  # whatever transformers makes of an unknown tokenizer
            raise _unreadable(path, error) from None
        tokenizer.add_bos_token = begins_with_bos(GGUFReader(path))
        tokenizer.save_pretrained(folder)
        files = {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}
    settings = json.loads(files["tokenizer_config.json"])
    for key in ("is_local", "local_files_only"):  # about this machine, not about the tokenizer
        settings.pop(key, None)
    files["tokenizer_config.json"] = json.dumps(settings, indent=2).encode()
    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    generation = {key: config[key] for key in special if config.get(key) is not None}
    files["generation_config.json"] = json.dumps(generation, indent=2).encode()
    return files
