"""Safetensors written here are read by the format's own library, with the same bytes each time."""

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from quatom.checkpoint.safetensors_file import read_header, read_tensor, write_tensors
from quatom.errors import CheckpointError

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.uint8, torch.int8, torch.int32]


def to_bytes(tensors):
    stream = io.BytesIO()
    specs = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    write_tensors(stream, specs, tensors.__getitem__)
    return stream.getvalue()


@settings(deadline=None, max_examples=50)
@given(
    st.dictionaries(
        st.text("abc.0", min_size=1, max_size=6),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)),
        max_size=6,
    )
)
def test_round_trip_through_the_official_library(tmp_path_factory, specs):
    tensors = {name: torch.rand(shape).mul(9).to(dtype) for name, (dtype, shape) in specs.items()}
    data = to_bytes(tensors)
    theirs = load(data)
    file = tmp_path_factory.mktemp("st") / "a.safetensors"
    for content in (data, save(tensors)):
        file.write_bytes(content)
        header = read_header(file)
        assert header.keys() == theirs.keys() == tensors.keys()
        for name, tensor in tensors.items():
            ours = read_tensor(header[name])
            assert ours.dtype == theirs[name].dtype == tensor.dtype
            assert torch.equal(ours, tensor)
            assert torch.equal(theirs[name], tensor)


def test_bytes_do_not_depend_on_the_order_of_the_tensors():
    tensors = {"b": torch.ones(3), "a": torch.zeros(2, dtype=torch.int8), "c": torch.ones(1)}
    assert to_bytes(tensors) == to_bytes(dict(reversed(tensors.items())))


def test_a_transposed_tensor_is_written_in_its_own_order():
    tensor = torch.arange(6.0).view(2, 3).T
    assert torch.equal(load(to_bytes({"a": tensor}))["a"], tensor)


def test_every_tensor_is_aligned_to_its_item(tmp_path):
    file = tmp_path / "a.safetensors"
    file.write_bytes(to_bytes({"a": torch.ones(3, dtype=torch.int8), "b": torch.ones(5)}))
    for stored in read_header(file).values():
        assert stored.start % stored.dtype.itemsize == 0


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}',  # 8 bytes expected
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}',
        b'{"a":{"dtype":"F32","shape":[1]}}',
        b'{"a":3}',
        b"[]",
    ],
)
def test_contradicting_headers_are_refused(tmp_path, header):
    file = tmp_path / "a.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(CheckpointError, match=r"damaged safetensors header"):
        read_header(file)


def test_bytes_that_belong_to_no_tensor_are_refused(tmp_path):
    file = tmp_path / "a.safetensors"
    data = to_bytes({"a": torch.ones(3), "b": torch.ones(3)})
    overlapping = data.replace(b"[12,24]", b"[0,12] ")
    third = to_bytes({"a": torch.ones(3), "b": torch.ones(3), "c": torch.ones(3)})
    twice = third.replace(b"[12,24]", b"[0,12] ")  # as many bytes as the file has, and a gap
    for content in (data + b"x", data[:-1], overlapping, twice):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"truncated or damaged: (its header|tensor b)"):
            read_header(file)


def test_a_dtype_that_torch_does_not_have_is_named(tmp_path):
    file = tmp_path / "a.safetensors"
    header = b'{"a": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}'
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    with pytest.raises(CheckpointError, match=r"tensor a has dtype 'F4', which is not supported"):
        read_header(file)
