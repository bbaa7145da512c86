"""What `linear` means, in plain torch. The kernels are judged against this file.

Weights are dequantized once, when they are prepared: the reference is also the backend of accuracy
runs on a CPU, where a float32 matrix product is the fastest thing there is.
"""

import torch
from torch import Tensor

from quatom.numerics.groups import GroupLayout, dequantize_groups
from quatom.ops.activations import MixedTensor


def prepare_reference(values: Tensor, scales: Tensor, layout: GroupLayout) -> Tensor:
    """Real weights, (N, K) float32."""
    return dequantize_groups(values, scales, layout)


def linear_reference(x: MixedTensor | Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See `linear`. Runs on any device."""
    real = x.dequantize() if isinstance(x, MixedTensor) else x.float()
    return torch.nn.functional.linear(real, weight, bias).to(x.dtype)
