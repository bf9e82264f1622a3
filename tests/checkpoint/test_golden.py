"""The golden checkpoint: its files, byte for byte, recomputed from docs/FORMAT.md alone.

Nothing of vllm_bmos builds these bytes: the header is JSON by hand, signs are Python integers and
scales are struct's half floats. `python -m tests.checkpoint.test_golden` writes the files anew.
"""

import hashlib
import json
import struct
from pathlib import Path

import pytest
import torch

from vllm_bmos.checkpoint import Checkpoint, unpack_signs
from vllm_bmos.checkpoint.verify import verify
from vllm_bmos.checkpoint.writer import CheckpointWriter

GOLDEN = Path(__file__).parent.parent / "data/golden"
SHA256 = {
    "bmos_manifest.json": "13a81eb05b07e2f8d1d4141512b4eec8bee8fa4e971b2399b539a918d90d4fa1",
    "config.json": "f98378b3bfdd770dfa425214d50db31ea38c82715fb80cd60aa602f2c0fabc51",
    "model.safetensors": "2016588c52f0ebb0bc48c7dd413c164782f84df1fbbfe14983d42e3d6c6a571b",
}
MODULE = "model.layers.0.mlp.up_proj"
SIGNS = ["+--+++++-+", "++++++++++", "-+-+-+-+-+"]  # N = 3, K = 10
SCALES = {  # E = 2
    "in_channel_scale": [[k / 8 for k in range(1, 11)], [-k / 16 for k in range(1, 11)]],
    "out_channel_scale": [[0.5, 1.0, 2.0], [65504.0, 6e-8, 0.0]],
    "router_weight": [[0.0] * 10, [1.0, -1.0] * 5],
}


def tensors() -> dict[str, tuple[str, list[int], bytes]]:
    """(dtype, shape, bytes) of every tensor, in the order of the file."""
    made = {
        f"{MODULE}.{name}": (
            "F16",
            [len(rows), len(rows[0])],
            b"".join(struct.pack(f"<{len(row)}e", *row) for row in rows),
        )
        for name, rows in SCALES.items()
    }
    made["model.norm.weight"] = ("F16", [2], struct.pack("<2e", 1.0, 0.25))
    rows = [sum(1 << k for k, sign in enumerate(row) if sign == "+") for row in SIGNS]
    packed = b"".join(row.to_bytes(2, "little") for row in rows)
    made[f"{MODULE}.weight_packed"] = ("U8", [3, 2], packed)
    return made


def files() -> dict[str, bytes]:
    """Every file of the golden checkpoint."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, (dtype, shape, content) in tensors().items():
        offsets = [len(data), len(data) + len(content)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += content
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    manifest = {
        "format_version": 1,
        "tensors": {
            name: {"dtype": dtype, "shape": shape, "sha256": hashlib.sha256(content).hexdigest()}
            for name, (dtype, shape, content) in sorted(tensors().items())
        },
    }
    config = {
        "model_type": "llama",
        "quantization_config": {
            "quant_method": "binarymos",
            "format_version": 1,
            "num_experts": 2,
            "scale_dtype": "float16",
            "modules": [MODULE],
            "ignore": [],
            "provenance": {},
        },
    }
    return {
        "bmos_manifest.json": (json.dumps(manifest, indent=2) + "\n").encode(),
        "config.json": (json.dumps(config, indent=2) + "\n").encode(),
        "model.safetensors": len(text).to_bytes(8, "little") + text + data,
    }


@pytest.mark.parametrize("name", sorted(SHA256))
def test_bytes(name):
    content = (GOLDEN / name).read_bytes()
    assert hashlib.sha256(content).hexdigest() == SHA256[name]
    assert content == files()[name]


def test_reads_as_what_went_in():
    checkpoint = verify(GOLDEN)
    assert checkpoint.shapes == {MODULE: (3, 10)}
    signs = unpack_signs(checkpoint.tensor(f"{MODULE}.weight_packed"), 10)
    assert ["".join("+" if sign > 0 else "-" for sign in row) for row in signs] == SIGNS
    for name, rows in SCALES.items():
        found = checkpoint.tensor(f"{MODULE}.{name}")
        assert torch.equal(found, torch.tensor(rows).half())


def test_the_writer_makes_the_same_bytes(tmp_path):
    golden = Checkpoint(GOLDEN)
    writer = CheckpointWriter(tmp_path, golden.specs, 1_000_000)
    for name in golden.specs:
        writer.write(name, golden.tensor(name))
    writer.finish()
    for name in ("model.safetensors", "bmos_manifest.json"):
        assert (tmp_path / name).read_bytes() == (GOLDEN / name).read_bytes()


if __name__ == "__main__":
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for name, content in files().items():
        (GOLDEN / name).write_bytes(content)
        print(f'    "{name}": "{hashlib.sha256(content).hexdigest()}",')
