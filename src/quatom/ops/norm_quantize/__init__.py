"""Residual add -> normalization -> channel reorder -> dynamic mixed-precision quantization."""

from torch import Tensor

from quatom.errors import ShapeError
from quatom.families.spec import Norm
from quatom.ops.activations import MixedTensor, QuantizeSpec
from quatom.ops.backend import Backend, choose_backend
from quatom.ops.cuda_quantize import can_quantize
from quatom.ops.experts.groups import ExpertSum, summed
from quatom.ops.norm import check_norm
from quatom.ops.norm import norm as normalize
from quatom.ops.norm_quantize.reference import norm_quantize_reference
from quatom.ops.reorder_quantize import reorder_quantize

BACKENDS = (Backend.REFERENCE, Backend.TRITON, Backend.CUDA)
_MOST_SUMMANDS = 8
"""Results of experts that quantize.cu adds up in registers."""


def norm_quantize(
    x: Tensor | ExpertSum,  # (T, K) float16, bfloat16 or float32, last axis contiguous
    weight: Tensor,  # (K,)
    order: Tensor | None,  # (K,) int32 channel at each position; None: they are in order already
    spec: QuantizeSpec,
    *,
    norm: Norm,
    bias: Tensor | None = None,  # (K,), where norm.bias
    residual: Tensor | None = None,  # (T, K) same dtype as x
    backend: Backend | None = None,
) -> tuple[MixedTensor, Tensor]:
    """Add the residual, normalize each token, reorder its channels and quantize them.

    total = x + residual (rounded to x's dtype);
    centred = total, or total - mean(total) for a layer norm;
    normed = centred * rsqrt(mean(centred**2) + eps) * (weight + weight_offset) + bias, in float32;
    channel j of the result is channel order[j] of normed, quantized group by group.

    Backends sum the squares in another order, so inverse norms differ by an ulp: codes differ by
    one step on at most one element in a thousand.

    Args:
        x: tokens, or sums of experts' results: the same as their `combine`, which CUDA adds up as
            it reads them.
        spec: groups, formats and clip ratio; `spec.byte_layout` is what the linear op reads.
        norm: kind, eps and offset; whether there is a bias.
        backend: implementation to run; None picks the fastest one for x's device.

    Returns:
        the quantized tokens, and total, (T, K) in x's dtype: the next residual (x itself where no
        residual is given).

    Raises:
        ShapeError: shapes or dtypes disagree with each other or with the layout, or there is a
            bias that the norm has not.
        BackendError: the backend does not exist or has no kernel for the formats.

    Source: Atom (Zhao et al., MLSys 2024), fused reorder and quantization of the norm's output.
    """
    if isinstance(x, ExpertSum) and (residual is None or x.weights.shape[1] > _MOST_SUMMANDS):
        x = x.combine()
    like = x.y[: x.weights.shape[0]] if isinstance(x, ExpertSum) else x
    _check(like, weight, order, spec, norm, bias, residual)
    able = BACKENDS if can_quantize(like, spec, norm, weight, bias) else BACKENDS[:2]
    available = BACKENDS if backend else able  # a backend asked for says itself what it lacks
    chosen = choose_backend("norm_quantize", available, like.device, backend)
    if chosen is Backend.CUDA:
        from quatom.ops.norm_quantize.cuda import norm_quantize_cuda

        return norm_quantize_cuda(x, weight, order, spec, norm, bias, residual)
    if chosen is Backend.TRITON:
        from quatom.ops.norm_quantize.triton import norm_quantize_triton as run
    else:
        run = norm_quantize_reference
    return run(summed(x), weight, order, spec, norm, bias, residual)


def norm_and_quantize(
    x: Tensor,  # (T, K) float16, bfloat16 or float32, last axis contiguous
    weight: Tensor,  # (K,)
    order: Tensor | None,  # (K,) int32, a permutation; None: channels are in order already
    spec: QuantizeSpec,
    *,
    norm: Norm,
    bias: Tensor | None = None,  # (K,), where norm.bias
    residual: Tensor | None = None,  # (T, K) same dtype as x
    backend: Backend | None = None,
) -> tuple[MixedTensor, Tensor, Tensor]:
    """`norm`, then `reorder_quantize` of its result: for layers that read the rounded rows too.

    Args and errors are those of `norm_quantize`.

    Returns:
        the quantized tokens, the normalized ones (T, K) in x's dtype, which they are codes of, and
        the sum of x and residual.
    """
    _check(x, weight, order, spec, norm, bias, residual)
    able = can_quantize(x, spec, norm, weight, bias)
    available = BACKENDS if able or backend else BACKENDS[:2]
    if choose_backend("norm_and_quantize", available, x.device, backend) is Backend.CUDA:
        from quatom.ops.cuda_quantize import quantize_cuda

        normed = x.new_empty(x.shape)
        quantized, total = quantize_cuda(
            "norm",
            x,
            spec,
            order=order,
            weight=weight,
            norm=norm,
            bias=bias,
            residual=residual,
            kept=normed,
        )
        return quantized, normed, total
    normed, total = normalize(x, weight, norm=norm, bias=bias, residual=residual, backend=backend)
    return reorder_quantize(normed, order, spec, backend=backend), normed, total


def _check(
    x: Tensor,
    weight: Tensor,
    order: Tensor | None,
    spec: QuantizeSpec,
    norm: Norm,
    bias: Tensor | None,
    residual: Tensor | None,
) -> None:
    channels = spec.layout.channels
    if x.ndim != 2 or x.shape[1] != channels or weight.shape != (channels,):
        raise ShapeError(
            f"expected x (T, {channels}) and weight ({channels},) as the layout says; got "
            f"{tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if order is not None and order.shape != (channels,):
        raise ShapeError(f"expected order ({channels},); got {tuple(order.shape)}")
    check_norm(x, weight, norm, bias, residual)
