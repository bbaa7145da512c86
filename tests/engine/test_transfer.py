"""Arrays that travel to the device together."""

import numpy as np
import torch

from quatom.engine.transfer import _offsets, _pack, _unpack, to_device_together

ARRAYS = [
    np.arange(5, dtype=np.int64) - 2,
    np.array([[1, 2, 3], [4, 5, 6]], dtype=np.int32),
    np.zeros(0, dtype=np.int64),
    np.array([0.5, -1.0, 7.0], dtype=np.float32),
    np.array([[9], [8]], dtype=np.int32)[::-1],  # not contiguous
]


def test_arrays_that_travel_together_keep_values_shapes_and_types():
    offsets = _offsets(ARRAYS)
    packed = torch.full((offsets[-1],), 0xFF, dtype=torch.uint8)
    _pack(ARRAYS, offsets, packed.numpy())
    for array, tensor in zip(ARRAYS, _unpack(packed, ARRAYS, offsets), strict=True):
        assert torch.equal(tensor, torch.from_numpy(array.copy()))
        assert tensor.dtype == torch.from_numpy(array.copy()).dtype
        assert tensor.data_ptr() % 16 == packed.data_ptr() % 16  # wide loads stay possible


def test_on_a_cpu_nothing_is_copied():
    arrays = ARRAYS[:4]
    for array, tensor in zip(arrays, to_device_together(arrays, torch.device("cpu")), strict=True):
        assert torch.equal(tensor, torch.from_numpy(array))
        assert not array.size or tensor.data_ptr() == array.ctypes.data
