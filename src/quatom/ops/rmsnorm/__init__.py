"""Residual add -> RMSNorm, for inputs that stay in floating point."""

from torch import Tensor

from quatom.errors import ShapeError
from quatom.ops.backend import Backend, choose_backend

BACKENDS = (Backend.REFERENCE, Backend.TRITON)


def rmsnorm(
    x: Tensor,  # (T, K) float16, bfloat16 or float32, last axis contiguous
    weight: Tensor,  # (K,)
    *,
    eps: float,
    residual: Tensor | None = None,  # (T, K) same dtype as x
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Add the residual and normalize each token.

    total = x + residual (rounded to x's dtype);
    result = (total * rsqrt(mean(total**2) + eps), rounded to x's dtype) * weight.

    The statistics are float32. `rmsnorm_quantize` is the same for inputs that are quantized, where
    nothing is rounded in between.

    Args:
        eps: added to the mean square before the square root.
        backend: implementation to run; None picks the fastest one for x's device.

    Returns:
        the normalized tokens and total, both (T, K) in x's dtype (total is x itself where no
        residual is given).

    Raises:
        ShapeError: shapes or dtypes disagree.

    Source: Zhang and Sennrich, NeurIPS 2019; the rounding is that of Hugging Face's LlamaRMSNorm.
    """
    if x.ndim != 2 or weight.shape != x.shape[1:]:
        raise ShapeError(
            f"expected x (T, K) and weight (K,), got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ShapeError(
            f"expected residual {tuple(x.shape)} {x.dtype} like x; got {tuple(residual.shape)} "
            f"{residual.dtype}"
        )
    if choose_backend("rmsnorm", BACKENDS, x.device, backend) is Backend.TRITON:
        from quatom.ops.rmsnorm.triton import rmsnorm_triton as run
    else:
        from quatom.ops.rmsnorm.reference import rmsnorm_reference as run
    return run(x, weight, eps, residual)
