"""The safetensors container: where each tensor of a file lies, read strictly and without a map.

A file is 8 bytes N (little endian), N bytes of JSON, then the tensors' bytes. The header is
checked whole before any tensor is touched. Data is read with `pread`, not through a memory map: a
mapped model counts as resident memory, and a file that shrinks under a map kills the process.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vllm_bmos.checkpoint.format import TORCH_DTYPES, FormatError, TensorSpec

# Bytes of one element, for every dtype of the container that has whole bytes.
ITEM_SIZES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "C64": 8,
}
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
MAX_DIMS = 64  # torch has no more; more would take long to multiply
METADATA_KEY = "__metadata__"
CHUNK_BYTES = 2 << 20  # stays in a core's cache


class Extent(NamedTuple):
    """One tensor's place: its bytes are contiguous, row-major and little endian."""

    file: Path
    offset: int
    spec: TensorSpec

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return spec_bytes(self.spec)

    def rows(self, start: int, stop: int) -> "Extent":
        """The extent of rows start to stop-1 of a tensor with at least one dimension."""
        row_bytes = spec_bytes(TensorSpec(self.spec.dtype, self.spec.shape[1:]))
        shape = (stop - start, *self.spec.shape[1:])
        offset = self.offset + start * row_bytes
        return Extent(self.file, offset, TensorSpec(self.spec.dtype, shape))


def spec_bytes(spec: TensorSpec) -> int:
    """Bytes of a tensor of this dtype and shape."""
    return ITEM_SIZES[spec.dtype] * math.prod(spec.shape)


def read_extents(file: Path) -> dict[str, Extent]:
    """Every tensor of one safetensors file, in the file's order of names.

    Raises:
        FormatError: unless the header is well formed and its tensors fill the file exactly,
            without gap or overlap.
    """
    try:
        with file.open("rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            length = int.from_bytes(handle.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise FormatError(
                    f"{file}: the header claims {length} bytes, the file has {size}. It is "
                    "truncated or not a safetensors file; download or convert it again."
                )
            header = json.loads(handle.read(length), object_pairs_hook=_no_duplicates)
    except FileNotFoundError:
        raise FormatError(f"{file} is missing. Download or convert it again.") from None
    except FormatError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(
            f"{file} cannot be read as safetensors ({error}). It is damaged; download or convert "
            "it again."
        ) from None
    if not isinstance(header, dict):
        raise FormatError(f"{file}: the header is not an object. Download or convert it again.")
    header.pop(METADATA_KEY, None)
    start, end = 8 + length, size
    extents = {name: _extent(file, start, name, entry) for name, entry in header.items()}
    position = start
    for name, extent in sorted(extents.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if extent.offset != position:
            raise FormatError(
                f"{file}: {name} starts at byte {extent.offset}, expected {position}: tensors "
                "overlap or leave a gap. It is damaged; download or convert it again."
            )
        position += extent.nbytes
    if position != end:
        raise FormatError(
            f"{file}: the tensors end at byte {position}, the file at {end}. It is truncated or "
            "damaged; download or convert it again."
        )
    return extents


def _extent(file: Path, start: int, name: str, entry: Any) -> Extent:
    """One entry of a header. Only sizes are believed, and only after they are checked."""
    if not (
        isinstance(entry, dict)
        and entry.keys() == {"dtype", "shape", "data_offsets"}
        and _sizes(entry["shape"])
        and _sizes(entry["data_offsets"])
        and len(entry["data_offsets"]) == 2
    ):
        raise FormatError(f"{file}: {name}: malformed header entry. Download or convert it again.")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in ITEM_SIZES:
        raise FormatError(
            f"{file}: {name}: dtype {entry['dtype']!r} is not supported; expected one of "
            f"{', '.join(ITEM_SIZES)}."
        )
    begin, end = entry["data_offsets"]
    spec = TensorSpec(entry["dtype"], tuple(entry["shape"]))
    if end - begin != spec_bytes(spec):
        raise FormatError(
            f"{file}: {name}: {spec} needs {spec_bytes(spec)} bytes, the header gives "
            f"{end - begin}. It is damaged; download or convert it again."
        )
    return Extent(file, start + begin, spec)


def _sizes(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= MAX_DIMS
        and all(type(v) is int and 0 <= v < 1 << 62 for v in value)
    )


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) != len(pairs):
        raise ValueError("a name occurs twice in the header")
    return keys


def encode_header(specs: Mapping[str, TensorSpec]) -> tuple[bytes, dict[str, int]]:
    """The header of a new file, and the offset of every tensor in it.

    Tensors are laid out by falling element size, then name, so that each is aligned to its own
    element size, as readers that view the bytes in place need.
    """
    order = sorted(specs, key=lambda name: (-ITEM_SIZES[specs[name].dtype], name))
    header: dict[str, Any] = {METADATA_KEY: {"format": "pt"}}
    offsets, position = {}, 0
    for name in order:
        dtype, shape = specs[name]
        end = position + spec_bytes(specs[name])
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        offsets[name], position = position, end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {n: start + at for n, at in offsets.items()}


def read_tensor(extent: Extent) -> torch.Tensor:
    """Read a tensor into new memory.

    Raises:
        FormatError: for a dtype that no language model's weight has, or if the file ends early.
    """
    if extent.spec.dtype not in TORCH_DTYPES:
        raise FormatError(
            f"{extent.file}: a tensor of dtype {extent.spec.dtype} cannot be read; expected one "
            f"of {', '.join(TORCH_DTYPES)}."
        )
    if extent.nbytes == 0:
        return torch.empty(extent.spec.shape, dtype=TORCH_DTYPES[extent.spec.dtype])
    data = torch.empty(extent.nbytes, dtype=torch.uint8)
    _fill(data.numpy().data, extent)
    return data.view(TORCH_DTYPES[extent.spec.dtype]).reshape(extent.spec.shape)


def read_chunks(extent: Extent) -> Iterator[memoryview]:
    """The bytes of a tensor in chunks of bounded size. Each chunk is overwritten by the next."""
    buffer = memoryview(bytearray(min(CHUNK_BYTES, extent.nbytes)))
    for start in range(0, extent.nbytes, CHUNK_BYTES):
        chunk = buffer[: min(CHUNK_BYTES, extent.nbytes - start)]
        _fill(chunk, Extent(extent.file, extent.offset + start, extent.spec))
        yield chunk


def _fill(buffer: memoryview, extent: Extent) -> None:
    descriptor = os.open(extent.file, os.O_RDONLY)
    try:
        done = 0
        while done < len(buffer):
            count = os.preadv(descriptor, [buffer[done:]], extent.offset + done)
            if count == 0:
                raise FormatError(
                    f"{extent.file} ends early: it was truncated while it was being read. "
                    "Download or convert it again."
                )
            done += count
    finally:
        os.close(descriptor)
