"""Linear layers over quantized operands: one operation, in which the scheme is data.

    y[t, n] = sum over groups s of xs[t, s] * ws[n, s] * sum over k in s of x[t, k] * w[n, k]
              + bias[n]

with codes x, w and float32 sums over groups; w4a4, w4a8, w8a8 and w4a16 differ in the formats of
the codes alone. Weights are repacked once by `prepare_weights` into the layout of the backend that
will run.

Limits of the backends:

reference  every format, any device; holds the weights in float32
cpu        integer weights and activations of at most 8 bits; x86 with AVX-512 VNNI
triton     integer weights, odd4 ones in a byte each; integer, e4m3 or floating-point activations;
           sm_80 and later
cublas     int8 by int8 with one scale per row, and int2 to int4 weights under floating-point
           activations, without outliers; CUDA
cuda       int2 to int4 weights with int2 to int4 or e4m3 activations, or, where scales of weights
           are multiples of one per row (`quatom.numerics.multiples`), with int8 activations of one
           scale per token or int2 to int4 ones of multiples; groups of at most 128 channels, INT8
           outliers, N a multiple of 4; sm_90 (Hopper)
"""

import torch
from torch import Tensor

from quatom.errors import ShapeError
from quatom.numerics.formats import get_format
from quatom.numerics.groups import GroupLayout, ScaleMode
from quatom.ops.activations import MixedTensor
from quatom.ops.backend import Backend
from quatom.ops.groups_layout import holds_int8
from quatom.ops.linear.choice import choose_linear_backend
from quatom.ops.linear.cpu import linear_cpu, prepare_cpu
from quatom.ops.linear.prepared import PreparedLinear
from quatom.ops.linear.reference import linear_reference, prepare_reference

__all__ = ["BACKENDS", "PreparedLinear", "linear", "prepare_weights"]

BACKENDS = (Backend.REFERENCE, Backend.CPU, Backend.TRITON, Backend.CUBLAS, Backend.CUDA)


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
    chosen = choose_linear_backend(
        "linear", BACKENDS, values, scales, layout, formats, scale_mode, backend
    )
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
            from quatom.ops.linear.triton_product import prepare_triton

            tensors = prepare_triton(values, scales, layout, get_format(weight_format).integer_bits)
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
    prepared.check_input(x)
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
