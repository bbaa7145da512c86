"""What `norm_quantize` means, in plain torch. The kernels are judged against this file."""

from torch import Tensor

from quatom.families.spec import Norm
from quatom.ops.activations import MixedTensor, QuantizeSpec, quantize_rows
from quatom.ops.norm.reference import norm_weight, normalize


def norm_quantize_reference(
    x: Tensor,
    weight: Tensor,
    order: Tensor | None,
    spec: QuantizeSpec,
    norm: Norm,
    bias: Tensor | None,
    residual: Tensor | None,
) -> tuple[MixedTensor, Tensor]:
    """See `norm_quantize`. Runs on any device."""
    # The sum is rounded to the activations' dtype before it is normalized, as it is stored.
    total = x if residual is None else (x.float() + residual.float()).to(x.dtype)
    normed = normalize(total.float(), norm) * norm_weight(weight, norm)
    if bias is not None:
        normed = normed + bias.float()
    return quantize_rows(normed, spec, x.dtype, order), total
