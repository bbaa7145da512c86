"""What `rmsnorm_quantize` means, in plain torch. The kernels are judged against this file."""

import torch
from torch import Tensor

from quatom.ops.activations import MixedTensor, QuantizeSpec, quantize_rows


def rmsnorm_quantize_reference(
    x: Tensor,
    weight: Tensor,
    order: Tensor | None,
    spec: QuantizeSpec,
    eps: float,
    residual: Tensor | None,
) -> tuple[MixedTensor, Tensor]:
    """See `rmsnorm_quantize`. Runs on any device."""
    # The sum is rounded to the activations' dtype before it is normalized, as it is stored.
    total = x if residual is None else (x.float() + residual.float()).to(x.dtype)
    normed = torch.nn.functional.rms_norm(total.float(), weight.shape, weight.float(), eps)
    return quantize_rows(normed, spec, x.dtype, order), total
