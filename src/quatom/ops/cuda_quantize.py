"""Launch of quantize.cu: the quantize operations in the byte layout `groups`, on Hopper."""

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import get_args

import torch
from torch import Tensor

from quatom.errors import BackendError
from quatom.families.spec import Activation, Norm
from quatom.numerics.formats import get_format
from quatom.numerics.hadamard import common_block
from quatom.ops.activations import MixedTensor, QuantizeSpec, allocate_groups
from quatom.ops.cuda_build import (
    CudaKernel,
    KernelArguments,
    compile_cubin,
    device_capability,
    load_kernel,
    multiprocessors,
    read_source,
)
from quatom.ops.quantize_variants import Operation, Variant, choose_variant
from quatom.ops.spread import crowd, padded_bytes

_MOST_SPREAD = {1: 2, 2: 1}
"""CTAs of a multiprocessor up to which a launch is spread over the GPU, by the CTAs of a cluster.
Larger clusters are not: one waits for room for all its CTAs at once."""
_OPERATIONS = {"reorder": 0, "norm": 1, "gated": 2}
_ACTIVATIONS = {name: number for number, name in enumerate(get_args(Activation))}


class _Arguments(KernelArguments):
    _fields_ = (
        ("x", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("order", ctypes.c_void_p),
        ("total", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("tokens", ctypes.c_int),
        ("padded", ctypes.c_int),
        ("channels", ctypes.c_int),
        ("x_stride", ctypes.c_int),
        ("residual_stride", ctypes.c_int),
        ("ctas", ctypes.c_int),
        ("inverse_channels", ctypes.c_float),
        ("eps", ctypes.c_float),
        ("normal", ctypes.c_int),
        ("group_size", ctypes.c_int),
        ("outlier_size", ctypes.c_int),
        ("normal_groups", ctypes.c_int),
        ("num_scales", ctypes.c_int),
        ("clip_ratio", ctypes.c_float),
        ("largest", ctypes.c_int),
        ("bias", ctypes.c_void_p),  # the driver takes these where the kernel was compiled with them
        ("kept", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("shares", ctypes.c_void_p),
    )


@dataclass(frozen=True, slots=True)
class _Plan:
    """What launches of one kind share."""

    kernel: CudaKernel
    layout: tuple[float | int, ...]
    """Arguments from `normal` on."""


def defines(
    operation: Operation,
    variant: Variant,
    spec: QuantizeSpec,
    dtype: torch.dtype,
    norm: Norm | None = None,
    activation: Activation = "silu",
    gated: bool = True,
    keep: bool = False,
    summands: int = 0,
) -> dict[str, int]:
    """The constants that quantize.cu is compiled with."""
    return {
        "OPERATION": _OPERATIONS[operation],
        "THREADS": variant.threads,
        "TOKENS": variant.tokens,
        "VECTORS": -(-spec.layout.channels // (4 * variant.threads)),
        "ROUNDS": -(-spec.layout.num_scales // (variant.threads // 16 * variant.ctas)),
        "INPUT_BF16": int(dtype is torch.bfloat16),
        "E4M3": int(spec.normal == "e4m3"),
        "INT8": int(spec.normal == "int8"),
        "ROTATE": int(spec.rotate),
        "BLOCK": common_block(spec.layout) if spec.rotate else 0,
        "WHOLE_TOKEN": int(spec.scale_mode != "group"),
        "MULTIPLES": int(spec.scale_mode == "multiples"),
        "CLUSTER": variant.ctas if spec.scale_mode != "group" else 1,
        "LAYER": int(norm is not None and norm.kind == "layer"),
        "WEIGHT_OFFSET": int(norm.weight_offset) if norm is not None else 0,
        "BIAS": int(norm is not None and norm.bias),
        "KEEP": int(keep),
        "SUMMANDS": summands,
        "ACTIVATION": _ACTIVATIONS[activation],
        "GATED": int(gated),
    }


def _shared_bytes(operation: Operation, variant: Variant, channels: int, norm: Norm | None) -> int:
    """Rows of 16-bit numbers, weight and bias of a norm beside them, partial sums of each warp."""
    if operation == "gated":
        return 0
    if norm is None:
        return channels * 2 * variant.tokens
    sums = 2 if norm.kind == "layer" else 1
    rows = channels * 2 * (variant.tokens + 1 + norm.bias)
    return rows + sums * variant.tokens * variant.threads // 32 * 4


@cache
def _plan(
    operation: Operation,
    variant: Variant,
    spec: QuantizeSpec,
    dtype: torch.dtype,
    device: int,
    norm: Norm | None,
    activation: Activation,
    gated: bool,
    keep: bool,
    summands: int,
    most: int,
) -> _Plan:
    source = read_source("quatom.ops", "quantize.cu")
    constants = defines(operation, variant, spec, dtype, norm, activation, gated, keep, summands)
    cubin = compile_cubin(source, "sm_90a", constants)
    layout = spec.layout
    needed = _shared_bytes(operation, variant, layout.channels, norm)
    with torch.cuda.device(device):
        kernel = load_kernel(
            cubin,
            "quantize_groups",
            threads=variant.threads,
            shared_bytes=padded_bytes(needed, most),
            cluster=constants["CLUSTER"],
        )
    return _Plan(
        kernel,
        (
            layout.normal,
            layout.group_size,
            layout.outliers // layout.outlier_blocks,
            layout.num_normal_groups,
            layout.num_scales,
            spec.clip_ratio,
            int(get_format(spec.normal).largest),
        ),
    )


def can_quantize(
    x: Tensor,
    spec: QuantizeSpec,
    norm: Norm | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> bool:
    """Whether quantize.cu handles this: Hopper, half precision, layout `groups`, groups of 8 n."""
    return _obstacle(x, spec, norm, weight, bias) is None


def _obstacle(
    x: Tensor, spec: QuantizeSpec, norm: Norm | None, weight: Tensor | None, bias: Tensor | None
) -> str | None:
    """Why quantize.cu cannot run this, or None if it can."""
    if x.device.type != "cuda":
        return f"the input is on {x.device}"
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.dtype is not x.dtype:
            return f"{name} {parameter.dtype} has another dtype than x {x.dtype}"
    if norm is not None and norm.weight_offset not in (0.0, 1.0):
        return f"it adds 0 or 1 to a norm's weight, not {norm.weight_offset}"
    return _spec_obstacle(spec, x.dtype, device_capability(x.device.index))


@cache
def _spec_obstacle(
    spec: QuantizeSpec, dtype: torch.dtype, capability: tuple[int, int]
) -> str | None:
    if spec.byte_layout != "groups":
        return f"it writes byte layout 'groups', not {spec.byte_layout!r}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it reads float16 and bfloat16, not {dtype}"
    if capability[0] != 9:
        return f"it needs compute capability 9.x, this device has {capability}"
    if spec.clip_ratio < 2.0**-11:
        return f"it clamps 16-bit codes, which overflow below clip_ratio 2**-11: {spec.clip_ratio}"
    layout = spec.layout
    if (layout.normal | layout.group_size | (layout.outliers // layout.outlier_blocks)) % 8:
        return f"a thread takes 8 channels of one group, these groups are {layout.group_sizes}"
    return None


def quantize_cuda(
    operation: Operation,
    x: Tensor,
    spec: QuantizeSpec,
    *,
    order: Tensor | None = None,
    weight: Tensor | None = None,
    norm: Norm | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: Activation = "silu",
    gated: bool = True,
    kept: Tensor | None = None,
    sums: tuple[Tensor, Tensor] | None = None,
    variant: Variant | None = None,
) -> tuple[MixedTensor, Tensor]:
    """Run one operation; the second result is the sum of x and residual, or x without one.

    Normalized rows are written to `kept`, (T, K) contiguous in x's dtype, where it is given; then
    those are what is quantized. With `sums`, of a norm with a residual, a token is a weighted sum
    of k rows of x, as `combine` gives it: positions (T k,) int32 and shares (T, k) float32.

    Raises:
        BackendError: the input is none that `can_quantize`.
    """
    if obstacle := _obstacle(x, spec, norm, weight, bias):
        raise BackendError(
            f"the CUDA quantize kernel cannot run this: {obstacle}; use backend 'triton' or "
            "'reference'"
        )
    layout = spec.layout
    tokens, channels = x.shape[0] if sums is None else sums[1].shape[0], layout.channels
    summands = 0 if sums is None else sums[1].shape[1]
    out = allocate_groups(x, tokens, spec)
    total = x if residual is None else x.new_empty((tokens, channels))
    x = _aligned(x)
    residual = None if residual is None else _aligned(residual)
    if not tokens:
        return out, total
    given = (weight, bias, order)
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    order = None if order is None else order.to(torch.int32).contiguous()
    variant = variant or choose_variant(operation, tokens, layout, spec.scale_mode != "group")
    keep = kept is not None
    device, ctas = x.device.index, -(-tokens // variant.tokens) * variant.ctas
    apart = 0 if variant.ctas > 1 and spec.scale_mode == "group" else variant.ctas
    most = crowd(ctas, multiprocessors(device), _MOST_SPREAD.get(apart, 0))
    plan = _plan(
        operation, variant, spec, x.dtype, device, norm, activation, gated, keep, summands, most
    )
    plan.kernel.launch(
        ctas,
        _Arguments(
            x.data_ptr(),
            None if residual is None else residual.data_ptr(),
            None if weight is None else weight.data_ptr(),
            None if order is None else order.data_ptr(),
            total.data_ptr(),
            out.codes.data_ptr(),
            out.scales.data_ptr(),
            tokens,
            out.codes.shape[1],
            channels,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            variant.ctas,
            1.0 / channels,
            0.0 if norm is None else norm.eps,
            *plan.layout,
            None if bias is None else bias.data_ptr(),
            None if kept is None else kept.data_ptr(),
            *(None, None) if sums is None else (part.data_ptr() for part in sums),
        ),
        # The kernel reads weight, bias and order while the kernel before it still runs: they must
        # not be that one's results.
        overlap=given[0] is weight and given[1] is bias and given[2] is order,
    )
    return out, total


def _aligned(x: Tensor) -> Tensor:
    """`x`, or a copy of it whose rows allow 16-byte loads."""
    if x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0:
        return x
    return x.contiguous().clone()
