"""What `head_norm` means, in plain torch."""

from torch import Tensor

from quatom.families.spec import HeadNormAxis, Norm
from quatom.ops.norm import rounds_before_weight
from quatom.ops.norm.reference import norm_weight, normalize


def head_norm_reference(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, norm: Norm, axis: HeadNormAxis
) -> tuple[Tensor, Tensor]:
    """See `head_norm`. Runs on any device; gradients flow through it."""
    made = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        rows = x.flatten(1) if axis == "all" else x
        normed = normalize(rows.float(), norm)
        if rounds_before_weight(norm):
            normed = normed.to(x.dtype)
        made.append((normed * norm_weight(weight, norm)).to(x.dtype).view(x.shape))
    return made[0], made[1]
