"""What `norm` means, in plain torch."""

from torch import Tensor
from torch.nn import functional

from quatom.families.spec import Norm
from quatom.ops.norm import rounds_before_weight


def normalize(rows: Tensor, norm: Norm) -> Tensor:  # (..., K) float32
    """Rows of mean square 1, of mean 0 too where norm is a layer norm."""
    if norm.kind == "layer":  # torch's layer_norm loses digits of a mean that is large
        rows = rows - rows.mean(dim=-1, keepdim=True)
    return functional.rms_norm(rows, rows.shape[-1:], eps=norm.eps)


def norm_weight(weight: Tensor, norm: Norm) -> Tensor:
    """What normalized rows are multiplied by, float32."""
    return weight.float() + norm.weight_offset if norm.weight_offset else weight.float()


def norm_reference(
    x: Tensor, weight: Tensor, norm: Norm, bias: Tensor | None, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `norm`. Runs on any device."""
    total = x if residual is None else x + residual
    normed = normalize(total.float(), norm)
    if rounds_before_weight(norm):
        normed = normed.to(x.dtype)
    normed = normed * norm_weight(weight, norm)
    if bias is not None:
        normed = normed + bias.float()
    return normed.to(x.dtype), total
