"""The linear layers of a decoder block. Precision lives here and in the KV cache alone.

Both classes take what an `InputQuantizer` returns: a plain tensor, or a MixedTensor of codes. A
float weight under quantized inputs is what calibration runs; codes under a plain tensor is W4A16.
"""

import torch
from torch import Tensor, nn

from quatom.numerics.formats import get_format
from quatom.numerics.groups import GroupLayout
from quatom.ops.activations import MixedTensor
from quatom.ops.backend import Backend
from quatom.ops.linear import linear, prepare_weights
from quatom.recipe import Recipe


class FloatLinear(nn.Module):
    """y = x W^T + b with a floating-point weight."""

    def __init__(
        self,
        weight: Tensor,  # (N, K), columns in the order of its input
        bias: Tensor | None = None,  # (N,)
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor | MixedTensor) -> Tensor:  # (T, K) -> (T, N)
        """Multiply; codes are dequantized first."""
        if isinstance(x, MixedTensor):
            x = x.dequantize().to(self.weight.dtype)
        return nn.functional.linear(x, self.weight, self.bias)


class QuantizedLinear(nn.Module):
    """y = x W^T + b with a weight of codes, repacked once for the backend that multiplies it."""

    def __init__(
        self,
        values: Tensor,  # (N, K) values of the formats in units of the scales
        scales: Tensor,  # (N, S) float16
        layout: GroupLayout,
        bias: Tensor | None,  # (N,)
        recipe: Recipe,
        dtype: torch.dtype,
        backend: Backend | None = None,
    ) -> None:
        super().__init__()
        self.prepared = prepare_weights(
            values,
            scales,
            layout,
            bias,
            weight_format=get_format(recipe.weights.format),
            outlier_format=get_format(recipe.outliers.format),
            activation_format=get_format(recipe.activations.format),
            dtype=dtype,
            backend=backend,
        )

    def forward(self, x: Tensor | MixedTensor) -> Tensor:  # (T, K) -> (T, N)
        """Multiply codes by codes, or dequantized weights by a plain tensor."""
        return linear(x, self.prepared)
