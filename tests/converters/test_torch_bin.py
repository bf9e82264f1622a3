"""Reading `.bin` files: where their tensors lie, and everything that such a file may try."""

import io
import os
import pickle
import zipfile

import pytest
import torch

from converters.sources.torch_bin import read_bin, read_bin_directory
from vllm_bmos.checkpoint import FormatError
from vllm_bmos.checkpoint.container import read_tensor


def save(path, value, **options):
    torch.save(value, path, **options)
    return path


def test_every_tensor_is_found_where_it_lies(tmp_path):
    base = torch.randn(6, 10)
    state = {
        "half": torch.randn(3, 5).half(),
        "bfloat": torch.randn(7).bfloat16(),
        "scalar": torch.tensor(2.5),
        "packed": torch.tensor([[1, -2]], dtype=torch.int8),
        "view": base[2:4],
        "same": base,
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
    }
    extents = read_bin(save(tmp_path / "x.bin", state))
    assert extents.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(read_tensor(extents[name]), value.detach())


def test_ordered_dicts_of_buffers(tmp_path):
    model = torch.nn.BatchNorm1d(4)
    extents = read_bin(save(tmp_path / "x.bin", model.state_dict()))
    assert extents["num_batches_tracked"].spec.dtype == "I64"


class Evil:
    def __reduce__(self):
        return os.system, (f"touch {Evil.mark}",)

    mark = ""


def test_a_pickle_runs_no_code(tmp_path):
    Evil.mark = str(tmp_path / "mark")
    with pytest.raises(FormatError, match=r"x\.bin cannot be loaded safely"):
        read_bin(save(tmp_path / "x.bin", {"a": Evil()}))
    assert not (tmp_path / "mark").exists()


def test_a_bare_pickle_is_not_loaded(tmp_path):
    Evil.mark = str(tmp_path / "mark")
    (tmp_path / "x.bin").write_bytes(pickle.dumps({"a": Evil()}))
    with pytest.raises(FormatError, match="is not a PyTorch zip file"):
        read_bin(tmp_path / "x.bin")
    assert not (tmp_path / "mark").exists()


def test_the_format_before_zip(tmp_path):
    file = save(tmp_path / "x.bin", {"a": torch.ones(2)}, _use_new_zipfile_serialization=False)
    with pytest.raises(FormatError, match=r"older than PyTorch 1\.6"):
        read_bin(file)


def test_a_compressed_member_is_a_zip_bomb(tmp_path):
    plain = save(tmp_path / "plain.bin", {"a": torch.zeros(1 << 20)})
    with (
        zipfile.ZipFile(plain) as source,
        zipfile.ZipFile(tmp_path / "x.bin", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for member in source.infolist():
            bomb.writestr(member.filename, source.read(member))
    assert (tmp_path / "x.bin").stat().st_size < plain.stat().st_size / 50
    with pytest.raises(FormatError, match="is compressed"):
        read_bin(tmp_path / "x.bin")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": torch.ones(4, 6).T}, "a is not stored row by row"),
        ({"a": torch.ones(1, 1).expand(1 << 20, 1 << 20)}, "a is not stored row by row"),
        ({"a": torch.eye(3).to_sparse()}, "a: expected a tensor|cannot be loaded safely"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, r"a: dtype torch\.complex64"),
        ({"a": 1.0}, "a: expected a tensor, found float"),
        ({"a": {"b": torch.ones(2)}}, "a: expected a tensor, found dict"),
        ({1: torch.ones(2)}, "expected names of tensors as keys, found 1"),
        ([torch.ones(2)], "expected a dict of tensors, found list"),
    ],
)
def test_what_is_not_a_state_dict(tmp_path, value, message):
    with pytest.raises(FormatError, match=message):
        read_bin(save(tmp_path / "x.bin", value))


def test_a_tensor_larger_than_its_storage(tmp_path):
    """A pickle that claims 10^12 elements over a storage of four."""
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(4)}, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(tmp_path / "x.bin", "w") as lying:
        for member in source.infolist():
            data = source.read(member)
            if member.filename.endswith("data.pkl"):
                # The shape (4,) and the stride (1,) follow the storage: K\x04\x85 K\x01\x85.
                assert data.count(b"K\x04\x85") == 1
                data = data.replace(
                    b"K\x04\x85", b"\x8a\x06" + (10**12).to_bytes(6, "little") + b"\x85"
                )
            lying.writestr(member.filename, data)
    with pytest.raises(FormatError, match=r"cannot be loaded safely|lies beyond the end"):
        read_bin(tmp_path / "x.bin")


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.99])
def test_truncated(tmp_path, keep):
    file = save(tmp_path / "x.bin", {"a": torch.ones(1000)})
    file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])
    with pytest.raises(FormatError, match=r"x\.bin"):
        read_bin(file)


def test_an_index_that_does_not_match(tmp_path):
    save(tmp_path / "pytorch_model-1.bin", {"a": torch.ones(2)})
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text('{"weight_map": {"a": "pytorch_model-1.bin", "b": "pytorch_model-1.bin"}}')
    with pytest.raises(FormatError, match="b: the index places it in"):
        read_bin_directory(tmp_path)
    index.write_text('{"weight_map": {"a": "../x/pytorch_model-1.bin"}}')
    with pytest.raises(FormatError, match=r"is not the name of a \.bin file"):
        read_bin_directory(tmp_path)
