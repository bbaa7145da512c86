"""Channel reorder -> dynamic mixed-precision quantization (attention output before o_proj)."""

from torch import Tensor

from quatom.errors import ShapeError
from quatom.ops.activations import MixedTensor, QuantizeSpec
from quatom.ops.backend import Backend, choose_backend
from quatom.ops.cuda_quantize import can_quantize
from quatom.ops.reorder_quantize.reference import reorder_quantize_reference

BACKENDS = (Backend.REFERENCE, Backend.TRITON, Backend.CUDA)


def reorder_quantize(
    x: Tensor,  # (T, K) float16, bfloat16 or float32, last axis contiguous
    order: Tensor | None,  # (K,) int32 channel at each position; None: they are in order already
    spec: QuantizeSpec,
    *,
    backend: Backend | None = None,
) -> MixedTensor:
    """Reorder the channels of each token and quantize them group by group.

    Channel j of the result is channel order[j] of x. Scales are float16 numbers, the stored scale
    divides, rounding is half-to-even: all backends give the same codes and scales bit for bit.

    Args:
        spec: groups, formats and clip ratio; `spec.byte_layout` is what the linear op reads.
        backend: implementation to run; None picks the fastest one for x's device.

    Raises:
        ShapeError: x, order and the layout have different numbers of channels.
        BackendError: the backend does not exist or has no kernel for the formats.

    Source: Atom (Zhao et al., MLSys 2024), dynamic quantization with channel reordering.
    """
    channels = spec.layout.channels
    if x.ndim != 2 or x.shape[1] != channels:
        raise ShapeError(f"expected x (T, {channels}) as the layout says; got {tuple(x.shape)}")
    if order is not None and order.shape != (channels,):
        raise ShapeError(f"expected order ({channels},); got {tuple(order.shape)}")
    able = BACKENDS if can_quantize(x, spec) else BACKENDS[:2]
    available = BACKENDS if backend else able  # a backend asked for says itself what it lacks
    match choose_backend("reorder_quantize", available, x.device, backend):
        case Backend.CUDA:
            from quatom.ops.reorder_quantize.cuda import reorder_quantize_cuda as run
        case Backend.TRITON:
            from quatom.ops.reorder_quantize.triton import reorder_quantize_triton as run
        case _:
            run = reorder_quantize_reference
    return run(x, order, spec)
