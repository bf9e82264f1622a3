"""Where the tensors of a PyTorch `.bin` file lie, without loading it and without trusting it.

The file is a zip of one pickle and the tensors' bytes. The pickle is read by PyTorch's restricted
unpickler (`weights_only`), which runs no code, in fake mode, which allocates nothing: each tensor
then only says at which offset its bytes are, and they are read like those of any other file.
"""

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vllm_bmos.checkpoint.container import Extent
from vllm_bmos.checkpoint.format import SAFETENSORS_DTYPES, FormatError, TensorSpec
from vllm_bmos.checkpoint.reader import check_weight_map, inside, read_weight_map

BIN_SINGLE = "pytorch_model.bin"
BIN_INDEX = "pytorch_model.bin.index.json"
MAX_PICKLE_BYTES = 64 << 20  # the names and shapes of a model of 100,000 tensors need less
# Other dtypes that a state dict holds beside its weights, such as position ids.
_BUFFER_DTYPES = {
    torch.bool: "BOOL",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float64: "F64",
}
_DTYPES = {**SAFETENSORS_DTYPES, **_BUFFER_DTYPES}


def read_bin_directory(path: Path) -> dict[str, Extent]:
    """Every tensor of a directory of `.bin` files, in one file or sharded with an index.

    Raises:
        FormatError: for a missing, damaged or unsafe file, or an index that does not match.
    """
    index = path / BIN_INDEX
    weight_map = read_weight_map(index, ".bin") if index.exists() else None
    extents: dict[str, Extent] = {}
    for file_name in sorted(set(weight_map.values())) if weight_map else [BIN_SINGLE]:
        for name, extent in read_bin(inside(path, file_name)).items():
            if name in extents:
                raise FormatError(f"{name} is in both {extents[name].file.name} and {file_name}.")
            extents[name] = extent
    check_weight_map(weight_map, {name: extent.file.name for name, extent in extents.items()})
    return extents


def read_bin(file: Path) -> dict[str, Extent]:
    """Every tensor of one `.bin` file.

    Raises:
        FormatError: if the file is damaged, compressed, or holds anything but tensors.
    """
    _check_zip(file)
    try:
        with FakeTensorMode():
            state = torch.load(file, weights_only=True)
    except Exception as error:  # whatever the restricted unpickler makes of a hostile pickle
        reason = str(error).partition("\n")[0]
        raise FormatError(
            f"{file} cannot be loaded safely ({type(error).__name__}: {reason}). Convert it to "
            "safetensors on a machine where you trust it."
        ) from None
    if not isinstance(state, dict):
        raise FormatError(f"{file}: expected a dict of tensors, found {type(state).__name__}.")
    size = file.stat().st_size
    return {_name(file, name): _extent(file, size, name, value) for name, value in state.items()}


def _check_zip(file: Path) -> None:
    """Refuse what is not a plain zip: an old format, or members that unpack to more than they are.

    Raises:
        FormatError: naming the file.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise FormatError(
            f"{file} is not a PyTorch zip file ({error}). It is damaged, or older than PyTorch "
            "1.6; save it again with a newer one, or as safetensors."
        ) from None
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED:
            raise FormatError(f"{file}: {member.filename} is compressed. PyTorch never does that.")
        if member.filename.endswith(".pkl") and member.file_size > MAX_PICKLE_BYTES:
            raise FormatError(f"{file}: {member.filename} has {member.file_size} bytes: too many.")


def _name(file: Path, name: Any) -> str:
    if not isinstance(name, str):
        raise FormatError(f"{file}: expected names of tensors as keys, found {name!r}.")
    return name


def _extent(file: Path, size: int, name: str, value: Any) -> Extent:
    """A fake tensor's place in the file, checked against the file's size."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        raise FormatError(f"{file}: {name}: expected a tensor, found {type(value).__name__}.")
    if value.dtype not in _DTYPES:
        raise FormatError(f"{file}: {name}: dtype {value.dtype} is not supported.")
    if not value.is_contiguous():
        raise FormatError(f"{file}: {name} is not stored row by row. Save it again, contiguous.")
    start = getattr(value.untyped_storage(), "_checkpoint_offset", None)
    if start is None:
        raise FormatError(f"{file}: {name} has no bytes in the file. It is damaged.")
    offset = start + value.storage_offset() * value.element_size()
    extent = Extent(file, offset, TensorSpec(_DTYPES[value.dtype], tuple(value.shape)))
    if offset < 0 or offset + extent.nbytes > size:
        raise FormatError(f"{file}: {name} lies beyond the end of the file. It is truncated.")
    return extent
