"""What `rmsnorm` means, in plain torch."""

from torch import Tensor


def rmsnorm_reference(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `rmsnorm`. Runs on any device."""
    total = x if residual is None else x + residual
    inverse = (total.float().square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return (total.float() * inverse).to(x.dtype) * weight, total
