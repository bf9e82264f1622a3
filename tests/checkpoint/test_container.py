"""The strict safetensors reader: agreement with the library, and hostile headers."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from vllm_bmos.checkpoint.container import (
    Extent,
    encode_header,
    read_chunks,
    read_extents,
    read_tensor,
)
from vllm_bmos.checkpoint.format import FormatError, TensorSpec

VALUES = {
    "a": torch.arange(12, dtype=torch.float32).view(3, 4),
    "b": torch.arange(5, dtype=torch.uint8),
    "c": torch.randn(2, 2, 2).half(),
    "d": torch.zeros(0, 4),
    "e": torch.tensor(3.0, dtype=torch.bfloat16),
}


def raw(header: dict | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(begin: int, end: int, dtype: str = "U8", shape: list | None = None) -> dict:
    return {
        "dtype": dtype,
        "shape": [end - begin] if shape is None else shape,
        "data_offsets": [begin, end],
    }


def test_reads_what_the_library_writes(tmp_path):
    save_file(VALUES, tmp_path / "x.safetensors", metadata={"format": "pt"})
    extents = read_extents(tmp_path / "x.safetensors")
    assert extents.keys() == VALUES.keys()
    for name, value in VALUES.items():
        assert torch.equal(read_tensor(extents[name]), value)
        data = b"".join(bytes(chunk) for chunk in read_chunks(extents[name]))
        assert data == value.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_rows_of_a_tensor(tmp_path):
    save_file(VALUES, tmp_path / "x.safetensors")
    extent = read_extents(tmp_path / "x.safetensors")["c"]
    assert torch.equal(read_tensor(extent.rows(1, 2)), VALUES["c"][1:2])


def test_the_library_reads_what_encode_header_lays_out(tmp_path):
    specs = {
        "u": TensorSpec("U8", (3,)),  # an odd size must not leave the others unaligned
        "f": TensorSpec("F32", (2, 2)),
        "h": TensorSpec("F16", (5,)),
    }
    header, offsets = encode_header(specs)
    assert offsets["f"] % 4 == 0 and offsets["h"] % 2 == 0
    (tmp_path / "x.safetensors").write_bytes(header + bytes(16 + 10 + 3))
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert {n: (file.get_slice(n).get_dtype(), file.get_tensor(n).shape) for n in specs} == {
            "u": ("U8", (3,)),
            "f": ("F32", (2, 2)),
            "h": ("F16", (5,)),
        }
        assert file.metadata() == {"format": "pt"}


HOSTILE = {
    "empty file": (b"", "the header claims"),
    "short length": (b"\x05\x00", "the header claims"),
    "length beyond the file": ((1 << 40).to_bytes(8, "little") + b"{}", "the header claims"),
    "not JSON": (raw(b"\xff\xfe"), "cannot be read as safetensors"),
    "deep JSON": (raw(b"[" * 100_000), "cannot be read as safetensors"),
    "not an object": (raw(b"[]"), "the header is not an object"),
    "duplicate name": (
        raw(b'{"a": {}, "a": {}}'),
        "a name occurs twice",
    ),
    "entry without shape": (raw({"a": {"dtype": "U8", "data_offsets": [0, 0]}}), "a: malformed"),
    "negative size": (raw({"a": entry(0, 1, shape=[-1])}, b"1"), "a: malformed"),
    "fractional size": (raw({"a": entry(0, 1, shape=[1.0])}, b"1"), "a: malformed"),
    "unknown dtype": (raw({"a": entry(0, 1, "Q4")}, b"1"), "a: dtype 'Q4' is not supported"),
    "dtype is a list": (raw({"a": entry(0, 1, ["U8"])}, b"1"), "a: dtype .* is not supported"),
    "shape does not fit": (raw({"a": entry(0, 1, shape=[2])}, b"1"), "needs 2 bytes"),
    "overflowing shape": (raw({"a": entry(0, 1, shape=[1 << 40, 1 << 40])}, b"1"), "needs"),
    "too many dimensions": (raw({"a": entry(0, 1, shape=[1] * 65)}, b"1"), "a: malformed"),
    "offset beyond the file": (raw({"a": entry(0, 9)}, b"1"), "end at byte"),
    "overlap": (raw({"a": entry(0, 2), "b": entry(1, 3)}, b"123"), "b starts at byte"),
    "same bytes twice": (raw({"a": entry(0, 2), "b": entry(0, 2)}, b"12"), "overlap or leave"),
    "gap": (raw({"a": entry(0, 1), "b": entry(2, 3)}, b"123"), "b starts at byte"),
    "trailing bytes": (raw({"a": entry(0, 1)}, b"123"), "the tensors end at byte"),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_hostile_headers(tmp_path, fault):
    content, message = HOSTILE[fault]
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(FormatError, match=message):
        read_extents(file)


def test_missing_file(tmp_path):
    with pytest.raises(FormatError, match=r"x\.safetensors is missing"):
        read_extents(tmp_path / "x.safetensors")


def test_file_that_shrinks_while_it_is_read(tmp_path):
    file = tmp_path / "x.safetensors"
    save_file(VALUES, file)
    extent = read_extents(file)["a"]
    file.write_bytes(b"gone")
    with pytest.raises(FormatError, match="ends early"):
        read_tensor(extent)
    with pytest.raises(FormatError, match="ends early"):
        list(read_chunks(extent))


def test_a_dtype_no_weight_has(tmp_path):
    extent = Extent(tmp_path, 0, TensorSpec("I64", (1,)))
    with pytest.raises(FormatError, match="dtype I64 cannot be read"):
        read_tensor(extent)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_damage_is_refused_or_harmless(tmp_path_factory, data):
    """Flip, cut or add bytes anywhere: a FormatError, or a header that still fits its file."""
    file = tmp_path_factory.mktemp("damage") / "x.safetensors"
    save_file(VALUES, file)
    content = bytearray(file.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position : position + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    file.write_bytes(content)
    try:
        extents = read_extents(file)
    except FormatError:
        return
    assert sum(extent.nbytes for extent in extents.values()) <= len(content)
    for extent in extents.values():
        for _ in read_chunks(extent):
            pass
