"""Linear layers over quantized operands: one operation, in which the scheme is data.

    y[t, n] = sum over groups s of xs[t, s] * ws[n, s] * sum over k in s of x[t, k] * w[n, k]
              + bias[n]

with codes x, w and float32 sums over groups; w4a4, w4a8, w8a8 and w4a16 differ in the formats of
the codes alone. Weights are repacked once by `prepare_weights` into the layout of the backend that
will run.

Limits of the backends:

reference  every format, any device; holds the weights in float32
cpu        integer weights and activations of at most 8 bits; x86 with AVX-512 VNNI
triton     integer weights; integer, e4m3 or floating-point activations; sm_80 and later
cublas     int8 by int8 with one scale per row, and int2 to int4 weights under floating-point
           activations, without outliers; CUDA
cuda       int2 to int4 weights with int2 to int4 or e4m3 activations, or, where scales of weights
           are multiples of one per row (`quatom.numerics.multiples`), with int8 activations of one
           scale per token or int2 to int4 ones of multiples; groups of at most 128 channels, INT8
           outliers, N a multiple of 4; sm_90 (Hopper)
"""

import os
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quatom.errors import BackendError, QuantizationError, ShapeError
from quatom.numerics.formats import get_format
from quatom.numerics.groups import GroupLayout, ScaleMode
from quatom.numerics.multiples import split_multiples
from quatom.ops.activations import ByteLayout, MixedTensor, QuantizeSpec
from quatom.ops.backend import Backend, choose_backend, note_choice
from quatom.ops.groups_layout import check_fits_groups, holds_int8
from quatom.ops.linear.cpu import cpu_obstacle, linear_cpu, prepare_cpu
from quatom.ops.linear.reference import linear_reference, prepare_reference

BACKENDS = (Backend.REFERENCE, Backend.CPU, Backend.TRITON, Backend.CUBLAS, Backend.CUDA)
_MOST_INT8_PRODUCTS = 2**17 - 1
"""Whose sum int32 holds: each is at most 2**14."""
_BYTE_LAYOUTS: dict[Backend, ByteLayout] = {Backend.CPU: "padded", Backend.CUDA: "groups"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedLinear:
    """Weights of one linear layer in the layout of one backend."""

    backend: Backend
    layout: GroupLayout
    out_channels: int
    """N."""
    weight_format: str
    activation_format: str
    tensors: tuple[Tensor, ...]
    """Weights, and where the backend keeps them apart outliers and scales, in its own layout."""
    bias: Tensor | None  # (N,) float32

    @property
    def byte_layout(self) -> ByteLayout:
        """The layout of activations that this backend reads."""
        return _BYTE_LAYOUTS.get(self.backend, "rows")

    def input_spec(self, spec: QuantizeSpec) -> QuantizeSpec:
        """`spec` with the byte layout that this layer reads."""
        return replace(spec, byte_layout=self.byte_layout)


def prepare_weights(
    values: Tensor,  # (N, K) weight codes in reordered channel order, any dtype that holds them
    scales: Tensor,  # (N, S) float16
    layout: GroupLayout,
    *,
    bias: Tensor | None = None,  # (N,)
    weight_format: str = "int4",
    activation_format: str = "int4",
    outlier_format: str = "int8",
    scale_mode: ScaleMode = "group",
    backend: Backend | None = None,
) -> PreparedLinear:
    """Repack weights once, at load, for the backend that will run them.

    Layers that share an input (q, k, v; gate, up) are fused by concatenating their rows first.

    Args:
        activation_format: what the layer's input is quantized to; float16 for w4a16.
        scale_mode: how the scales of the input's groups depend on each other.
        backend: None picks the fastest one for the device and the formats.

    Raises:
        ShapeError: values, scales, bias and layout do not fit each other.
        BackendError: the backend asked for cannot run these formats on this device.
    """
    if values.ndim != 2 or values.shape[1] != layout.channels:
        raise ShapeError(
            f"expected values (N, {layout.channels}) as the layout says; got {tuple(values.shape)}"
        )
    rows = values.shape[0]
    if scales.shape != (rows, layout.num_scales):
        raise ShapeError(
            f"expected scales ({rows}, {layout.num_scales}): one per row and group; got "
            f"{tuple(scales.shape)}"
        )
    if bias is not None and bias.shape != (rows,):
        raise ShapeError(f"expected bias ({rows},); got {tuple(bias.shape)}")

    formats = (weight_format, activation_format, outlier_format)
    tensors: tuple[Tensor, ...]
    chosen = _choose(values, scales, layout, formats, scale_mode, backend)
    match chosen:
        case Backend.CUDA:
            from quatom.ops.linear.hopper_layout import pack_weights

            tensors = pack_weights(
                values, scales, layout, multiples=holds_int8(activation_format, scale_mode)
            )
            # The kernel fetches weights before it waits for the kernel before it: be sure that
            # this one is not the packing.
            torch.cuda.synchronize(values.device)
        case Backend.TRITON | Backend.CUBLAS:
            from quatom.ops.linear.triton import prepare_triton

            tensors = prepare_triton(values, scales, layout, get_format(weight_format).bits)
        case Backend.CPU:
            tensors = prepare_cpu(values, scales, layout)
        case _:
            tensors = (prepare_reference(values, scales, layout),)
    return PreparedLinear(
        backend=chosen,
        layout=layout,
        out_channels=rows,
        weight_format=weight_format,
        activation_format=activation_format,
        tensors=tensors,
        bias=None if bias is None else bias.float(),
    )


def linear(
    x: MixedTensor | Tensor,  # (T, K); a plain tensor where activations are not quantized
    prepared: PreparedLinear,
) -> Tensor:
    """Multiply activations by prepared weights: (T, N) in x's dtype.

    On integer codes with power-of-two scales all backends agree bit for bit, as long as sums stay
    below 2**24 steps of float32; otherwise they differ by float32 rounding.

    Raises:
        ShapeError: x has other channels or another byte layout than the weights were prepared for.
    """
    if x.shape[-1] != prepared.layout.channels or len(x.shape) != 2:
        raise ShapeError(
            f"expected x (T, {prepared.layout.channels}) as the weights; got {tuple(x.shape)}"
        )
    if isinstance(x, MixedTensor):
        if x.spec.layout != prepared.layout or x.spec.byte_layout != prepared.byte_layout:
            raise ShapeError(
                f"x is quantized as {x.spec.layout}, bytes {x.spec.byte_layout!r}, and the weights "
                f"expect {prepared.layout}, bytes {prepared.byte_layout!r}: quantize with "
                "prepared.input_spec(spec)"
            )
        if x.spec.normal != prepared.activation_format:
            raise ShapeError(
                f"x is {x.spec.normal}, the weights are prepared for activations in "
                f"{prepared.activation_format}"
            )
    elif prepared.activation_format != "float16":
        raise ShapeError(
            f"x is a plain tensor, the weights are prepared for activations in "
            f"{prepared.activation_format}: quantize x first"
        )
    match prepared.backend:
        case Backend.CUDA:
            from quatom.ops.linear.cuda import linear_cuda

            return linear_cuda(x, prepared.tensors, prepared.out_channels, prepared.bias)
        case Backend.TRITON:
            from quatom.ops.linear.triton import linear_triton

            return linear_triton(
                x, prepared.tensors, prepared.layout, prepared.out_channels, prepared.bias
            )
        case Backend.CUBLAS:
            from quatom.ops.linear.cublas import linear_cublas

            return linear_cublas(
                x, prepared.tensors, prepared.layout, prepared.out_channels, prepared.bias
            )
        case Backend.CPU:
            assert isinstance(x, MixedTensor)  # it is prepared for integer activations alone
            return linear_cpu(x, prepared.tensors, prepared.out_channels, prepared.bias)
        case _:
            return linear_reference(x, prepared.tensors[0], prepared.bias)


def _choose(
    values: Tensor,
    scales: Tensor,
    layout: GroupLayout,
    formats: tuple[str, str, str],
    scale_mode: ScaleMode,
    asked: Backend | None,
) -> Backend:
    """The backend that runs these formats; BackendError where one asked for cannot."""
    weight, activation, outlier = formats
    obstacles = {
        Backend.CUDA: _cuda_obstacle(values, scales, layout, formats, scale_mode),
        Backend.CUBLAS: _cublas_obstacle(values, layout, weight, activation),
        Backend.TRITON: _triton_obstacle(layout, weight, outlier),
        Backend.CPU: cpu_obstacle(values, layout, formats if layout.outliers else formats[:2]),
    }
    able = tuple(b for b in BACKENDS if not obstacles.get(b))
    if asked is None and "QUATOM_BACKEND" not in os.environ:
        if Backend.CPU in able:  # which means that the weights are on a CPU
            return note_choice("linear", Backend.CPU)
        return choose_backend("linear", able, values.device)
    chosen = choose_backend("linear", BACKENDS, values.device, asked)
    if chosen not in able:
        raise BackendError(f"linear cannot run on backend {chosen}: {obstacles[chosen]}")
    return chosen


def _triton_obstacle(layout: GroupLayout, weight: str, outlier: str) -> str | None:
    if not get_format(weight).is_integer:
        return f"its weights must be integers, not {weight}; use the reference backend"
    if layout.outliers and outlier != "int8":
        return f"its outliers must be int8, not {outlier}; use the reference backend"
    return None


def _cublas_obstacle(
    values: Tensor, layout: GroupLayout, weight: str, activation: str
) -> str | None:
    if values.device.type != "cuda":
        return f"it needs a CUDA device, the weights are on {values.device}"
    if layout.outliers:
        return f"it multiplies one format, this layout has {layout.outliers} outlier channels"
    if (weight, activation) == ("int8", "int8"):
        if layout.num_scales != 1:
            return f"its INT8 product has one scale per row, this layout has {layout.num_scales}"
        if values.shape[0] % 8 or layout.channels % 8:
            return f"INT8 sizes must be multiples of 8, got {tuple(values.shape)}"
        return None
    if weight in ("int2", "int3", "int4") and activation == "float16":
        return None
    return f"it runs int8 by int8 and int2 to int4 by float16, not {weight} by {activation}"


def _cuda_obstacle(
    values: Tensor,
    scales: Tensor,
    layout: GroupLayout,
    formats: tuple[str, str, str],
    scale_mode: ScaleMode,
) -> str | None:
    weight, activation, outlier = formats
    device, rows = values.device, values.shape[0]
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return f"it needs a Hopper GPU (sm_90), the weights are on {device}"
    if rows % 4:
        return f"it stores four output channels at a time, there are {rows}: pad the weights"
    if weight not in ("int2", "int3", "int4"):
        return f"its weights must be int2 to int4, not {weight}"
    try:
        check_fits_groups(layout, activation, outlier, scale_mode)
        if holds_int8(activation, scale_mode):
            if layout.normal > _MOST_INT8_PRODUCTS:
                return (
                    f"{layout.normal} products of INT8 numbers overflow int32, "
                    f"{_MOST_INT8_PRODUCTS} do not"
                )
            split_multiples(scales[:, : layout.num_normal_groups])
    except (ShapeError, QuantizationError) as error:
        return str(error)
    return None
