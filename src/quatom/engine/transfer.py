"""Copies from the host to the device that nobody waits for."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 16
"""Bytes at whose multiples arrays begin that travel together."""
_DTYPES = {np.int64: torch.int64, np.int32: torch.int32, np.float32: torch.float32}
"""Of arrays that travel together."""


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy to the device without waiting; on a CPU the tensor shares the array's memory."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor


def to_device_together(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Copy several arrays at once: on a GPU a copy of a few bytes takes as long as one of many."""
    if device.type != "cuda":
        return [torch.from_numpy(array) for array in arrays]
    offsets = _offsets(arrays)
    packed = torch.empty(offsets[-1], dtype=torch.uint8, pin_memory=True)
    _pack(arrays, offsets, packed.numpy())
    return _unpack(packed.to(device, non_blocking=True), arrays, offsets)


def _offsets(arrays: Sequence[np.ndarray]) -> list[int]:
    """Where each array begins, in bytes, and where the last one ends, rounded up."""
    sizes = [-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in arrays]
    return [0, *np.cumsum(sizes).tolist()]


def _pack(arrays: Sequence[np.ndarray], offsets: Sequence[int], to: np.ndarray) -> None:
    for array, first in zip(arrays, offsets, strict=False):
        to[first : first + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _unpack(packed: Tensor, arrays: Sequence[np.ndarray], offsets: Sequence[int]) -> list[Tensor]:
    tensors = []
    for array, first in zip(arrays, offsets, strict=False):
        own = packed[first : first + array.nbytes].view(_DTYPES[array.dtype.type])
        tensors.append(own.view(array.shape))
    return tensors
