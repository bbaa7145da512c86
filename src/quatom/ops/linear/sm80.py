"""W4A4 on the INT4 tensor cores of Ampere and Ada, the paper's own hardware (sm_80 to sm_89).

`linear` does not choose this kernel by itself: it is simple, not tuned, and Triton's INT8 kernel
runs there too. Call `linear_sm80` with weights from `prepare_sm80`.
"""

import ctypes
from functools import cache
from importlib.resources import files

import torch
from torch import Tensor

from quatom.errors import BackendError, ShapeError
from quatom.numerics.formats import get_format
from quatom.numerics.groups import GroupLayout
from quatom.numerics.packing import pack_bits
from quatom.ops.activations import MixedTensor
from quatom.ops.cuda_build import (
    CudaKernel,
    KernelArguments,
    compile_cubin,
    device_capability,
    load_kernel,
)

_TILE_TOKENS, _TILE_CHANNELS = 64, 32


def prepare_sm80(
    values: Tensor,  # (N, K) INT4 codes with INT8 outliers, reordered
    scales: Tensor,  # (N, S)
    layout: GroupLayout,
) -> tuple[Tensor, Tensor, Tensor]:
    """Packed weights (N, normal / 2) uint8, outliers (N, R) int8 and scales (N, S) float32.

    Raises:
        ShapeError: a group is no multiple of the 64 channels of one instruction.
    """
    if layout.group_size % 64 or layout.normal % 64:
        raise ShapeError(
            f"the INT4 tensor-core kernel multiplies 64 channels at a time; group_size "
            f"{layout.group_size} and {layout.normal} normal channels must be multiples of 64"
        )
    codes = get_format("int4").encode(values[:, : layout.normal])
    outliers = values[:, layout.normal :].to(torch.int8).contiguous()
    return pack_bits(codes, 4).contiguous(), outliers, scales.float().contiguous()


def source_sm80() -> str:
    """The CUDA source; it needs no definitions."""
    return (files("quatom.ops.linear") / "kernel_sm80.cu").read_text()


@cache
def _kernel(device: int) -> CudaKernel:
    major, minor = device_capability(device)
    cubin = compile_cubin(source_sm80(), f"sm_{major}{minor}")
    with torch.cuda.device(device):
        return load_kernel(cubin, "linear_sm80", threads=128)


class _Arguments(KernelArguments):
    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("xs", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("outliers", ctypes.c_void_p),
        ("ws", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("tokens", ctypes.c_int),
        ("channels", ctypes.c_int),
        ("channel_blocks", ctypes.c_int),
        ("normal", ctypes.c_int),
        ("group_size", ctypes.c_int),
        ("outlier_channels", ctypes.c_int),
        ("outlier_size", ctypes.c_int),
    )


def linear_sm80(
    x: MixedTensor,
    weights: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None = None,  # (N,) float32
) -> Tensor:
    """Multiply INT4 activations by INT4 weights: (T, N) in x's dtype.

    Raises:
        BackendError: x is no INT4 tensor in byte layout `rows` on a GPU from sm_80 on.
    """
    spec = x.spec
    if spec.normal != "int4" or spec.byte_layout != "rows" or x.device.type != "cuda":
        raise BackendError(
            f"the INT4 tensor-core kernel reads int4 activations in byte layout 'rows' on a GPU, "
            f"got {spec.normal} in {spec.byte_layout!r} on {x.device}"
        )
    packed, outliers, scales = weights
    tokens, channels = x.tokens, packed.shape[0]
    y = torch.empty((tokens, channels), dtype=torch.float32, device=x.device)
    if not tokens:
        return y.to(x.dtype)
    layout = spec.layout
    blocks = -(-channels // _TILE_CHANNELS)
    pointers = (x.codes, x.scales, packed, outliers, scales, bias, y)
    _kernel(x.device.index).launch(
        blocks * -(-tokens // _TILE_TOKENS),
        _Arguments(
            *(None if p is None else p.data_ptr() for p in pointers),
            tokens,
            channels,
            blocks,
            layout.normal,
            layout.group_size,
            layout.outliers,
            max(1, layout.outliers // layout.outlier_blocks),
        ),
        overlap=False,
    )
    return y.to(x.dtype)
