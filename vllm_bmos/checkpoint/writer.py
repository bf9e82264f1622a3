"""Writes a packed checkpoint tensor by tensor, in any order, from any thread.

All sizes are known before the first byte: every file is created at its full length with its final
header, so a full disk shows at once, memory holds one tensor at a time, and the bytes do not
depend on the order of writing.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from vllm_bmos.checkpoint.container import Extent, encode_header, read_chunks, spec_bytes
from vllm_bmos.checkpoint.format import (
    FORMAT_VERSION,
    INDEX_FILE,
    MANIFEST_FILE,
    SAFETENSORS_DTYPES,
    SINGLE_FILE,
    FormatError,
    TensorSpec,
)


def plan_shards(
    specs: Mapping[str, TensorSpec], max_shard_size: int
) -> dict[str, dict[str, TensorSpec]]:
    """Assign tensors, in the given order, to files of at most `max_shard_size` bytes of data.

    A tensor that is larger than that gets a file of its own.

    Returns:
        The specs in each file, by file name.
    """
    shards: list[dict[str, TensorSpec]] = [{}]
    used = 0
    for name, spec in specs.items():
        size = spec_bytes(spec)
        if shards[-1] and used + size > max_shard_size:
            shards.append({})
            used = 0
        shards[-1][name] = spec
        used += size
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    count = len(shards)
    return {
        f"model-{number:05d}-of-{count:05d}.safetensors": shard
        for number, shard in enumerate(shards, start=1)
    }


class CheckpointWriter:
    """The .safetensors files, index and manifest of one packed checkpoint.

    Args:
        directory: an existing directory; files of an interrupted run in it are continued.
        specs: dtype and shape of every tensor, in the order in which they fill the files.
        max_shard_size: limit in bytes for the data of one file.

    Raises:
        OSError: if the disk has no room for the files.
    """

    def __init__(
        self, directory: Path, specs: Mapping[str, TensorSpec], max_shard_size: int
    ) -> None:
        self.directory = directory
        self.specs = dict(specs)
        self.files: dict[str, str] = {}
        self.sha256: dict[str, str] = {}
        self._extents: dict[str, Extent] = {}
        self._descriptors: dict[str, int] = {}
        try:
            for file, shard in plan_shards(specs, max_shard_size).items():
                header, offsets = encode_header(shard)
                self._create(file, header, len(header) + sum(map(spec_bytes, shard.values())))
                for name, spec in shard.items():
                    self.files[name] = file
                    self._extents[name] = Extent(directory / file, offsets[name], spec)
        except BaseException:
            self.close()
            raise

    def _create(self, file: str, header: bytes, size: int) -> None:
        descriptor = os.open(self.directory / file, os.O_RDWR | os.O_CREAT, 0o644)
        self._descriptors[file] = descriptor
        if os.fstat(descriptor).st_size != size:
            os.ftruncate(descriptor, 0)
            os.posix_fallocate(descriptor, 0, size)
        _write_all(descriptor, memoryview(header), 0)

    def write(self, name: str, tensor: torch.Tensor) -> str:
        """Write one tensor; return the sha256 of its bytes.

        Raises:
            FormatError: if its dtype or shape is not what was planned.
        """
        found = TensorSpec(SAFETENSORS_DTYPES[tensor.dtype], tuple(tensor.shape))
        if found != self.specs[name]:
            raise FormatError(f"{name}: planned as {self.specs[name]}, but became {found}.")
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return self.write_chunks(name, [data.data])

    def write_chunks(self, name: str, chunks: Iterable[memoryview]) -> str:
        """Write one tensor's bytes as they come; return their sha256.

        Raises:
            FormatError: if there are more or fewer bytes than planned.
        """
        extent, digest, done = self._extents[name], hashlib.sha256(), 0
        for chunk in chunks:
            if done + len(chunk) > extent.nbytes:
                break
            _write_all(self._descriptors[self.files[name]], chunk, extent.offset + done)
            digest.update(chunk)
            done += len(chunk)
        if done != extent.nbytes:
            raise FormatError(
                f"{name}: planned as {extent.spec} of {extent.nbytes} bytes, but its data has "
                "another length."
            )
        self.sha256[name] = digest.hexdigest()
        return self.sha256[name]

    def adopt(self, name: str, sha256: str) -> bool:
        """Keep what an interrupted run wrote of a tensor, if its bytes have this sha256."""
        if name not in self.specs or hash_extent(self._extents[name]) != sha256:
            return False
        self.sha256[name] = sha256
        return True

    def finish(self) -> None:
        """Make the files durable, then write the index (if there are several) and the manifest.

        Raises:
            FormatError: if a planned tensor was never written.
        """
        for name in self.specs:
            if name not in self.sha256:
                raise FormatError(f"{name} was planned but never written.")
        for descriptor in self._descriptors.values():
            os.fsync(descriptor)
        self.close()
        if len(set(self.files.values())) > 1:
            total = sum(map(spec_bytes, self.specs.values()))
            index = {
                "metadata": {"total_size": total},
                "weight_map": dict(sorted(self.files.items())),
            }
            write_json(self.directory / INDEX_FILE, index)
        tensors = {
            name: {"dtype": dtype, "shape": list(shape), "sha256": self.sha256[name]}
            for name, (dtype, shape) in sorted(self.specs.items())
        }
        write_json(
            self.directory / MANIFEST_FILE, {"format_version": FORMAT_VERSION, "tensors": tensors}
        )

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()


def hash_extent(extent: Extent) -> str:
    """The sha256 of a stored tensor's bytes, as the manifest records it."""
    return sha256_of(read_chunks(extent))


def sha256_of(chunks: Iterable[memoryview]) -> str:
    """The sha256 of bytes that come in chunks."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file durably; its bytes depend on the value only."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole small file durably: a reader sees all of it or none."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while len(data):
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count
