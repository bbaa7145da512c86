"""What `head_norm` means, in plain torch."""

from torch import Tensor

from quatom.families.spec import Norm
from quatom.ops.head_norm import Axis
from quatom.ops.norm import rounds_before_weight
from quatom.ops.norm.reference import norm_weight, normalize


def head_norm_reference(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, norm: Norm, axis: Axis
) -> tuple[Tensor, Tensor]:
    """See `head_norm`. Runs on any device."""
    heads = (q.shape[1], k.shape[1])
    out = q.new_empty(q.shape[0], sum(heads), q.shape[2])
    new_q, new_k = out.split(heads, dim=1)
    for x, weight, target in ((q, q_weight, new_q), (k, k_weight, new_k)):
        rows = x if axis == "head" else x.flatten(1)
        normed = normalize(rows.float(), norm)
        if rounds_before_weight(norm):
            normed = normed.to(x.dtype)
        target.copy_((normed * norm_weight(weight, norm)).view(x.shape))
    return new_q, new_k
