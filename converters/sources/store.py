"""Where a source's tensors come from: files that hold them as they are, read piece by piece."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch

from converters.sources.torch_bin import BIN_INDEX, BIN_SINGLE, read_bin_directory
from vllm_bmos.checkpoint.container import CHUNK_BYTES, Extent, read_chunks, read_tensor, spec_bytes
from vllm_bmos.checkpoint.format import INDEX_FILE, SINGLE_FILE, FormatError, TensorSpec
from vllm_bmos.checkpoint.reader import read_headers


class Store(Protocol):
    """Named tensors that are read one at a time."""

    specs: dict[str, TensorSpec]
    files: list[Path]

    def tensor(self, name: str) -> torch.Tensor:
        """Read a whole tensor."""
        ...

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """Read a tensor in blocks of rows, in order."""
        ...

    def chunks(self, name: str) -> Iterator[memoryview]:
        """Read a tensor's bytes in order."""
        ...


class FileStore:
    """Tensors that lie in files as contiguous bytes."""

    def __init__(self, extents: dict[str, Extent]) -> None:
        self.extents = extents
        self.specs = {name: extent.spec for name, extent in extents.items()}
        self.files = sorted({extent.file for extent in extents.values()})

    def tensor(self, name: str) -> torch.Tensor:
        """Read a whole tensor."""
        return read_tensor(self.extents[name])

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """Read a tensor in blocks of rows of about CHUNK_BYTES."""
        extent = self.extents[name]
        rows = extent.spec.shape[0]
        row_bytes = spec_bytes(TensorSpec(extent.spec.dtype, extent.spec.shape[1:]))
        step = max(1, CHUNK_BYTES // max(1, row_bytes))
        for start in range(0, rows, step):
            yield read_tensor(extent.rows(start, min(start + step, rows)))

    def chunks(self, name: str) -> Iterator[memoryview]:
        """Read a tensor's bytes in chunks."""
        return read_chunks(self.extents[name])


def open_directory(path: Path) -> FileStore:
    """The tensors of a model directory: safetensors or `.bin`, in one file or sharded.

    Raises:
        FormatError: if there are none, or if a header or the index is wrong.
    """
    if (path / INDEX_FILE).exists() or (path / SINGLE_FILE).exists():
        extents = read_headers(path)
    elif (path / BIN_INDEX).exists() or (path / BIN_SINGLE).exists():
        extents = read_bin_directory(path)
    else:
        names = ", ".join((SINGLE_FILE, INDEX_FILE, BIN_SINGLE, BIN_INDEX))
        raise FormatError(f"{path} holds no weights: none of {names}. Download the model again.")
    for name, extent in extents.items():
        if math.prod(extent.spec.shape) == 0:
            raise FormatError(f"{name}: {extent.spec} is empty. The source is damaged.")
    return FileStore(extents)
