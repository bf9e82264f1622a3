"""Opens a packed checkpoint and checks everything its headers say before any tensor is read."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from vllm_bmos.checkpoint.format import (
    BIAS,
    CONFIG_FILE,
    FORMAT_VERSION,
    INDEX_FILE,
    MANIFEST_FILE,
    SINGLE_FILE,
    BinaryMosConfig,
    FormatError,
    TensorSpec,
    check_linear,
    owner_of,
)


class Checkpoint:
    """A packed checkpoint directory whose names, dtypes, shapes and version are all valid.

    Opening reads JSON files and safetensors headers only; `tensor` reads data.

    Attributes:
        path: the directory.
        model_config: config.json as a dict.
        config: its `quantization_config`.
        manifest: what bmos_manifest.json says of every tensor: dtype, shape and sha256.
        specs: dtype and shape of every tensor, as the files' headers say.
        files: the name of the file that holds each tensor.
        shapes: (N, K) of every quantized layer by module name.

    Raises:
        FormatError: in one sentence that names the file, key or tensor.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.model_config = read_json(self.path / CONFIG_FILE)
        if "quantization_config" not in self.model_config:
            raise FormatError(
                f"{self.path / CONFIG_FILE}: quantization_config is missing, so this is not a "
                "packed BinaryMoS checkpoint. Run converters/hf_to_bmos.py on it first."
            )
        self.config = BinaryMosConfig.from_dict(self.model_config["quantization_config"])
        self.manifest = read_manifest(self.path / MANIFEST_FILE)
        self.specs, self.files = read_headers(self.path)
        check_inventory(self.manifest, self.specs)
        self.shapes = check_layers(self.config, self.specs)

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor onto the CPU."""
        file = self.path / self.files[name]
        with _safetensors_errors(file), safe_open(file, framework="pt") as handle:
            return handle.get_tensor(name)


def read_headers(path: Path) -> tuple[dict[str, TensorSpec], dict[str, str]]:
    """Dtype and shape of every tensor of a safetensors directory, and the file it is in.

    Serves packed and dense checkpoints, in one file or sharded with an index.

    Raises:
        FormatError: for a missing or damaged file, or an index that does not match the files.
    """
    index = path / INDEX_FILE
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(file, str) for file in weight_map.values()
        ):
            raise FormatError(f"{index}: weight_map is not an object of file names. Download again.")
        file_names = sorted(set(weight_map.values()))
    else:
        weight_map = None
        file_names = [SINGLE_FILE]
    specs: dict[str, TensorSpec] = {}
    files: dict[str, str] = {}
    for file_name in file_names:
        if Path(file_name).name != file_name or not file_name.endswith(".safetensors"):
            raise FormatError(
                f"{index}: {file_name!r} is not the name of a .safetensors file beside the index. "
                "Do not use this checkpoint."
            )
        if not (path / file_name).is_file():
            raise FormatError(f"{path / file_name} is missing. Download or convert it again.")
        with (
            _safetensors_errors(path / file_name),
            safe_open(path / file_name, framework="pt") as handle,
        ):
            for name in handle.keys():  # noqa: SIM118 (not a dict)
                if name in files:
                    raise FormatError(
                        f"{name} is in both {files[name]} and {file_name}. Convert again."
                    )
                view = handle.get_slice(name)
                specs[name] = TensorSpec(view.get_dtype(), tuple(view.get_shape()))
                files[name] = file_name
    if weight_map is not None and weight_map != files:
        for name in sorted(weight_map.keys() | files.keys()):
            if weight_map.get(name) != files.get(name):
                raise FormatError(
                    f"{name}: {INDEX_FILE} places it in {weight_map.get(name) or 'no file'}, but "
                    f"it is in {files.get(name) or 'no file'}. Download or convert again."
                )
    return specs, files


def read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    """Read bmos_manifest.json: {name: {"dtype", "shape", "sha256"}}.

    Raises:
        FormatError: if it is missing, of another version or malformed.
    """
    manifest = read_json(path)
    if manifest.get("format_version") != FORMAT_VERSION:
        raise FormatError(
            f"{path}: format_version: expected {FORMAT_VERSION}, found "
            f"{manifest.get('format_version')!r}. Upgrade vllm-bmos or convert again."
        )
    tensors = manifest.get("tensors")
    if not isinstance(tensors, dict):
        raise FormatError(f"{path}: tensors: expected an object. Convert again.")
    for name, entry in tensors.items():
        if not (
            isinstance(entry, dict)
            and entry.keys() == {"dtype", "shape", "sha256"}
            and isinstance(entry["dtype"], str)
            and isinstance(entry["sha256"], str)
            and isinstance(entry["shape"], list)
            and all(isinstance(size, int) for size in entry["shape"])
        ):
            raise FormatError(
                f"{path}: {name}: expected an object of dtype, shape and sha256. Convert again."
            )
    return tensors


def check_inventory(manifest: dict[str, dict[str, Any]], specs: dict[str, TensorSpec]) -> None:
    """Raise FormatError naming the first tensor in which files and manifest differ."""
    for name in sorted(manifest.keys() | specs.keys()):
        if name not in specs:
            raise FormatError(
                f"{name} is listed in {MANIFEST_FILE} but is in no .safetensors file. The "
                "checkpoint is incomplete; download or convert it again."
            )
        if name not in manifest:
            raise FormatError(
                f"{name} is in the .safetensors files but not in {MANIFEST_FILE}. The checkpoint "
                "was changed after it was written; download or convert it again."
            )
        want = TensorSpec(manifest[name]["dtype"], tuple(manifest[name]["shape"]))
        if specs[name] != want:
            raise FormatError(
                f"{name}: {MANIFEST_FILE} says {want}, the file holds {specs[name]}. The "
                "checkpoint was changed after it was written; download or convert it again."
            )


def check_layers(
    config: BinaryMosConfig, specs: dict[str, TensorSpec]
) -> dict[str, tuple[int, int]]:
    """Check every quantized layer, and that no tensor of the quantized kind is left over.

    Returns:
        (N, K) by module name.
    """
    shapes = {module: check_linear(module, specs, config) for module in config.modules}
    for name in specs:
        module = owner_of(name)
        if module is not None and module not in shapes:
            raise FormatError(
                f"{name}: {module} is not listed in quantization_config.modules. Convert again."
            )
        dense = name.removesuffix(".weight")
        if dense != name and dense in shapes:
            raise FormatError(
                f"{name}: {dense} is quantized, so it must not have a dense weight as well (only "
                f"an optional {BIAS}). Convert again."
            )
    return shapes


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FormatError: if the file is missing, unreadable or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FormatError(
            f"{path} is missing. Check the directory's name, or convert or download it again."
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise FormatError(f"{path} cannot be read as JSON ({error}). Download it again.") from None
    if not isinstance(value, dict):
        raise FormatError(f"{path}: expected a JSON object, found {type(value).__name__}.")
    return value


@contextmanager
def _safetensors_errors(file: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise FormatError(
            f"{file} cannot be read as safetensors ({error}). It is damaged or truncated; "
            "download or convert it again."
        ) from None
