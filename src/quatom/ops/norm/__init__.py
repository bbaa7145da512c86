"""Residual add -> normalization, for inputs that stay in floating point."""

from torch import Tensor

from quatom.errors import ShapeError
from quatom.families.spec import Norm
from quatom.ops.backend import Backend, choose_backend

BACKENDS = (Backend.REFERENCE, Backend.TRITON)


def norm(
    x: Tensor,  # (T, K) float16, bfloat16 or float32, last axis contiguous
    weight: Tensor,  # (K,)
    *,
    norm: Norm,
    bias: Tensor | None = None,  # (K,), where norm.bias
    residual: Tensor | None = None,  # (T, K) same dtype as x
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Add the residual and normalize each token.

    total = x + residual (rounded to x's dtype);
    centred = total, or total - mean(total) for a layer norm;
    result = centred * rsqrt(mean(centred**2) + eps) * (weight + weight_offset) + bias.

    All in float32 and rounded to x's dtype once, except that an RMS norm without offset is rounded
    before it meets its weight too, as Hugging Face's LlamaRMSNorm does. `norm_quantize` is the
    same for inputs that are quantized, where nothing is rounded in between.

    Args:
        norm: kind, eps and offset; whether there is a bias.
        backend: implementation to run; None picks the fastest one for x's device.

    Returns:
        the normalized tokens and total, both (T, K) in x's dtype (total is x itself where no
        residual is given).

    Raises:
        ShapeError: shapes or dtypes disagree, or there is a bias that the norm has not.

    Source: Zhang and Sennrich, NeurIPS 2019; Ba et al., 2016, for layer norms.
    """
    check_norm(x, weight, norm, bias, residual)
    if choose_backend("norm", BACKENDS, x.device, backend) is Backend.TRITON:
        from quatom.ops.norm.triton import norm_triton as run
    else:
        from quatom.ops.norm.reference import norm_reference as run
    return run(x, weight, norm, bias, residual)


def rounds_before_weight(norm: Norm) -> bool:
    """Whether the normalized row is rounded to its own dtype before it meets the weight."""
    return norm.kind == "rms" and norm.weight_offset == 0.0


def check_norm(
    x: Tensor, weight: Tensor, norm: Norm, bias: Tensor | None, residual: Tensor | None
) -> None:
    """What `norm` and `norm_quantize` ask of their arguments.

    Raises:
        ShapeError: shapes or dtypes disagree, or there is a bias that the norm has not.
    """
    if x.ndim != 2 or weight.shape != x.shape[1:]:
        raise ShapeError(
            f"expected x (T, K) and weight (K,), got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if (bias is not None) != norm.bias:
        raise ShapeError(
            f"the norm has {'a' if norm.bias else 'no'} bias, the call "
            f"{'none' if bias is None else 'one'}"
        )
    if bias is not None and bias.shape != weight.shape:
        raise ShapeError(f"expected bias {tuple(weight.shape)}, got {tuple(bias.shape)}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ShapeError(
            f"expected residual {tuple(x.shape)} {x.dtype} like x; got {tuple(residual.shape)} "
            f"{residual.dtype}"
        )
