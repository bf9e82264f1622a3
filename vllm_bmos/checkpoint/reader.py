"""Opens a packed checkpoint and checks everything its headers say before any tensor is read."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from vllm_bmos.checkpoint.container import Extent, read_extents, read_tensor
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

MAX_JSON_BYTES = 256 << 20  # an index of a million tensors needs less


class Checkpoint:
    """A packed checkpoint directory whose names, dtypes, shapes and version are all valid.

    Opening reads JSON files and safetensors headers only; `tensor` reads data.

    Attributes:
        path: the directory.
        model_config: config.json as a dict.
        config: its `quantization_config`.
        manifest: what bmos_manifest.json says of every tensor: dtype, shape and sha256.
        extents: where every tensor lies, as the files' headers say.
        specs: dtype and shape of every tensor.
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
        self.extents = read_headers(self.path)
        self.specs = {name: extent.spec for name, extent in self.extents.items()}
        check_inventory(self.manifest, self.specs)
        self.shapes = check_layers(self.config, self.specs)

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor onto the CPU."""
        return read_tensor(self.extents[name])


def read_headers(path: Path) -> dict[str, Extent]:
    """Every tensor of a safetensors directory: where it lies, its dtype and its shape.

    Serves packed and dense checkpoints, in one file or sharded with an index.

    Raises:
        FormatError: for a missing or damaged file, or an index that does not match the files.
    """
    index = path / INDEX_FILE
    weight_map = read_weight_map(index, ".safetensors") if index.exists() else None
    names = sorted(set(weight_map.values())) if weight_map else [SINGLE_FILE]
    extents = headers_of(path / name for name in names)
    check_weight_map(weight_map, {name: extent.file.name for name, extent in extents.items()})
    return extents


def check_files(config: BinaryMosConfig, files: Sequence[Path]) -> None:
    """Check a packed checkpoint's safetensors files against its index and its manifest.

    For readers that choose the files themselves, as transformers does. Of a model on a hub they
    download what they know, which the manifest is not.

    Raises:
        FormatError: as `Checkpoint` does.
    """
    folder, extents = files[0].parent, headers_of(files)
    specs = {name: extent.spec for name, extent in extents.items()}
    index, manifest = folder / INDEX_FILE, folder / MANIFEST_FILE
    if index.exists() and len(files) > 1:
        weight_map = read_weight_map(index, ".safetensors")
        check_weight_map(weight_map, {name: extent.file.name for name, extent in extents.items()})
    if manifest.exists() or snapshots_above(folder.resolve()) is None:
        check_inventory(read_manifest(manifest), specs)
    check_layers(config, specs)


def headers_of(files: Iterable[Path]) -> dict[str, Extent]:
    """Every tensor of some safetensors files.

    Raises:
        FormatError: for a missing or damaged file, or a tensor that is in two.
    """
    extents: dict[str, Extent] = {}
    for file in files:
        for name, extent in read_extents(inside(file.parent, file.name)).items():
            if name in extents:
                raise FormatError(
                    f"{name} is in both {extents[name].file.name} and {file.name}. Convert again."
                )
            extents[name] = extent
    return extents


def read_weight_map(index: Path, suffix: str) -> dict[str, str]:
    """Read an index: the file name of every tensor.

    Raises:
        FormatError: unless each is the name of a `suffix` file beside the index.
    """
    weight_map = read_json(index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(file, str) for file in weight_map.values())
    ):
        raise FormatError(f"{index}: weight_map is not an object of file names. Download again.")
    for file_name in sorted(set(weight_map.values())):
        if Path(file_name).name != file_name or not file_name.endswith(suffix):
            raise FormatError(
                f"{index}: {file_name!r} is not the name of a {suffix} file beside the index. "
                "Do not use this checkpoint."
            )
    return weight_map


def check_weight_map(weight_map: dict[str, str] | None, files: dict[str, str]) -> None:
    """Raise FormatError naming the first tensor that an index places in another file."""
    if weight_map is None or weight_map == files:
        return
    for name in sorted(weight_map.keys() | files.keys()):
        if weight_map.get(name) != files.get(name):
            raise FormatError(
                f"{name}: the index places it in {weight_map.get(name) or 'no file'}, but "
                f"it is in {files.get(name) or 'no file'}. Download or convert again."
            )


def inside(directory: Path, name: str) -> Path:
    """The regular file `name` of a directory; a symlink may not lead out of it.

    A hub's cache is the one exception: its snapshots are links into the `blobs` folder beside them,
    or into one that all its models share.

    Raises:
        FormatError: if there is no such regular file, or if a link leads elsewhere.
    """
    file = directory / name
    if not file.is_file():
        raise FormatError(f"{file} is missing or not a regular file. Download or convert it again.")
    folder, target = directory.resolve(), file.resolve()
    snapshots = snapshots_above(folder)
    cached = snapshots is not None and (
        target.parent == snapshots.parent / "blobs"
        or target.is_relative_to(snapshots.parent.parent / "blobs")
    )
    if target.parent != folder and not cached:
        raise FormatError(
            f"{file} is a link to {target}, outside its directory. Replace it by the file "
            "itself if you trust it."
        )
    return file


def snapshots_above(folder: Path) -> Path | None:
    """The folder `snapshots` of a hub's cache that a resolved folder lies in, or None."""
    return next((parent for parent in folder.parents if parent.name == "snapshots"), None)


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
        FormatError: if the file is missing, not a regular file of its directory, too large,
            unreadable or not an object.
    """
    file = inside(path.parent, path.name)
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            raise FormatError(f"{path} has more than {MAX_JSON_BYTES} bytes. Download it again.")
        value = json.loads(file.read_text(encoding="utf-8"))
    except FormatError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{path} cannot be read as JSON ({error}). Download it again.") from None
    if not isinstance(value, dict):
        raise FormatError(f"{path}: expected a JSON object, found {type(value).__name__}.")
    return value
