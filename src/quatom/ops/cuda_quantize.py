"""Launch of quantize.cu: the quantize operations in the byte layout `groups`, on Hopper."""

import ctypes
from functools import cache
from importlib.resources import files
from typing import Literal

import torch
from torch import Tensor

from quatom.errors import BackendError
from quatom.numerics.formats import get_format
from quatom.ops.activations import GROUP_BYTES, MixedTensor, QuantizeSpec, padded_tokens
from quatom.ops.cuda_build import CudaKernel, compile_cubin, load_kernel

Operation = Literal["reorder", "rmsnorm", "silu"]
_OPERATIONS = {"reorder": 0, "rmsnorm": 1, "silu": 2}
_THREADS = 256


@cache
def _kernel(
    operation: int, vectors: int, bf16: bool, e4m3: bool, shared: int, device: int
) -> CudaKernel:
    source = (files("quatom.ops") / "quantize.cu").read_text()
    constants = {
        "OPERATION": operation,
        "THREADS": _THREADS,
        "VECTORS": vectors,
        "INPUT_BF16": int(bf16),
        "E4M3": int(e4m3),
    }
    cubin = compile_cubin(source, "sm_90a", constants)
    with torch.cuda.device(device):
        return load_kernel(cubin, "quantize_groups", threads=_THREADS, shared_bytes=shared)


def can_quantize(x: Tensor, spec: QuantizeSpec) -> bool:
    """Whether quantize.cu handles this: Hopper, half precision, layout `groups`, no rotation."""
    return (
        x.device.type == "cuda"
        and spec.byte_layout == "groups"
        and not spec.rotate
        and x.dtype in (torch.float16, torch.bfloat16)
        and torch.cuda.get_device_capability(x.device)[0] == 9
    )


def quantize_cuda(
    operation: Operation,
    x: Tensor,
    spec: QuantizeSpec,
    *,
    order: Tensor | None = None,
    weight: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 0.0,
) -> tuple[MixedTensor, Tensor]:
    """Run one operation; the second result is the sum of x and residual, or x without one.

    Raises:
        BackendError: the input is none that `can_quantize`.
    """
    if not can_quantize(x, spec):
        raise BackendError(
            f"the CUDA quantize kernel writes byte layout 'groups' of float16 or bfloat16 inputs "
            f"on a Hopper GPU and does not rotate; got layout {spec.byte_layout!r} of {x.dtype} on "
            f"{x.device}, rotate {spec.rotate}: use backend 'triton' or 'reference'"
        )
    layout = spec.layout
    tokens, channels = x.shape[0], layout.channels
    padded = padded_tokens(tokens)
    codes = x.new_empty((layout.num_scales, padded, GROUP_BYTES), dtype=torch.uint8)
    scales = x.new_empty((layout.num_scales, padded, 2), dtype=torch.float32)
    out = MixedTensor(codes=codes, scales=scales, spec=spec, tokens=tokens, dtype=x.dtype)
    total = x if residual is None else x.new_empty((tokens, channels))
    x = _aligned(x)
    residual = None if residual is None else _aligned(residual)
    if not tokens:
        return out, total
    weight = None if weight is None else weight.to(x.dtype).contiguous()
    order = None if order is None else order.to(torch.int32).contiguous()
    groups_a_cta = _THREADS // 16
    chunks = -(-layout.num_scales // groups_a_cta) if operation == "silu" else 1
    kernel = _kernel(
        _OPERATIONS[operation],
        1 if operation == "silu" else -(-channels // (8 * _THREADS)),
        x.dtype is torch.bfloat16,
        spec.normal == "e4m3",
        0 if operation == "silu" else (channels + _THREADS // 32) * 4,
        x.device.index,
    )
    pointers = (x, residual, weight, order, total, codes, scales)
    residual_stride = 0 if residual is None else residual.stride(0)
    sizes = (padded, channels, x.stride(0), residual_stride, chunks)
    groups = (
        layout.normal,
        layout.group_size,
        layout.outliers // layout.outlier_blocks,
        layout.num_normal_groups,
        layout.num_scales,
    )
    with torch.cuda.device(x.device):
        kernel.launch(
            tokens * chunks,
            (
                *(ctypes.c_void_p(0 if p is None else p.data_ptr()) for p in pointers),
                *(ctypes.c_int(size) for size in sizes),
                ctypes.c_float(eps),
                *(ctypes.c_int(size) for size in groups),
                ctypes.c_float(spec.clip_ratio),
                ctypes.c_float(get_format(spec.normal).largest),
            ),
            overlap=True,
        )
    return out, total


def _aligned(x: Tensor) -> Tensor:
    """`x`, or a copy of it whose rows allow 16-byte loads."""
    if x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0:
        return x
    return x.contiguous().clone()
