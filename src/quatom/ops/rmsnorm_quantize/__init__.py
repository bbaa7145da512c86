"""Residual add -> RMSNorm -> channel reorder -> dynamic mixed-precision quantization."""

from torch import Tensor

from quatom.errors import ShapeError
from quatom.ops.activations import MixedTensor, QuantizeSpec
from quatom.ops.backend import Backend, choose_backend
from quatom.ops.cuda_quantize import can_quantize
from quatom.ops.rmsnorm_quantize.reference import rmsnorm_quantize_reference

BACKENDS = (Backend.REFERENCE, Backend.TRITON, Backend.CUDA)


def rmsnorm_quantize(
    x: Tensor,  # (T, K) float16, bfloat16 or float32, last axis contiguous
    weight: Tensor,  # (K,)
    order: Tensor | None,  # (K,) int32, a permutation; None: channels stand in order already
    spec: QuantizeSpec,
    *,
    eps: float,
    residual: Tensor | None = None,  # (T, K) same dtype as x
    backend: Backend | None = None,
) -> tuple[MixedTensor, Tensor]:
    """Add the residual, normalize each token, reorder its channels and quantize them.

    total = x + residual (rounded to x's dtype);
    normed = total * rsqrt(mean(total**2) + eps) * weight, in float32;
    channel j of the result is channel order[j] of normed, quantized group by group.

    Backends sum the squares in another order, so inverse norms differ by an ulp: codes differ by
    one step on at most one element in a thousand.

    Args:
        spec: groups, formats and clip ratio; `spec.byte_layout` is what the linear op reads.
        eps: added to the mean square before the square root.
        backend: implementation to run; None picks the fastest one for x's device.

    Returns:
        the quantized tokens, and total, (T, K) in x's dtype: the next residual (x itself where no
        residual is given).

    Raises:
        ShapeError: shapes or dtypes disagree with each other or with the layout.
        BackendError: the backend does not exist or has no kernel for the formats.

    Source: Atom (Zhao et al., MLSys 2024), fused reorder and quantization of the norm's output.
    """
    channels = spec.layout.channels
    if x.ndim != 2 or x.shape[1] != channels or weight.shape != (channels,):
        raise ShapeError(
            f"expected x (T, {channels}) and weight ({channels},) as the layout says; got "
            f"{tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if order is not None and order.shape != (channels,):
        raise ShapeError(f"expected order ({channels},); got {tuple(order.shape)}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ShapeError(
            f"expected residual {tuple(x.shape)} {x.dtype} like x; got {tuple(residual.shape)} "
            f"{residual.dtype}"
        )
    able = BACKENDS if can_quantize(x, spec) and weight.dtype == x.dtype else BACKENDS[:2]
    available = BACKENDS if backend else able  # a backend asked for says itself what it lacks
    match choose_backend("rmsnorm_quantize", available, x.device, backend):
        case Backend.CUDA:
            from quatom.ops.rmsnorm_quantize.cuda import rmsnorm_quantize_cuda as run
        case Backend.TRITON:
            from quatom.ops.rmsnorm_quantize.triton import rmsnorm_quantize_triton as run
        case _:
            run = rmsnorm_quantize_reference
    return run(x, weight, order, spec, eps, residual)
