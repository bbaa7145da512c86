"""The linear layers of a decoder block. Precision lives here and in the KV cache alone.

Linear classes take what an `InputQuantizer` returns: a plain tensor, or a MixedTensor of codes. A
float weight under quantized inputs is what calibration runs; codes under a plain tensor is W4A16.
"""

from torch import Tensor, nn

from quatom.ops.activations import MixedTensor
from quatom.ops.experts import PreparedExperts, TokenGroups, expert_linear
from quatom.ops.linear import PreparedLinear, linear


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

    def __init__(self, prepared: PreparedLinear) -> None:
        super().__init__()
        self.prepared = prepared

    def forward(self, x: Tensor | MixedTensor) -> Tensor:  # (T, K) -> (T, N)
        """Multiply codes by codes, or dequantized weights by a plain tensor."""
        return linear(x, self.prepared)


class FloatExperts(nn.Module):
    """y = x W_e^T + b_e of every row's expert e, with floating-point weights."""

    def __init__(
        self,
        weight: Tensor,  # (E, N, K), columns in the order of their input
        bias: Tensor | None = None,  # (E, N)
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor | MixedTensor, groups: TokenGroups, top_k: int | None) -> Tensor:
        """As `quatom.ops.experts.expert_linear`: (T k, N) in grouped order."""
        return expert_linear(x, self.weight, groups, top_k=top_k, bias=self.bias)

    def of_expert(self, expert: int, x: Tensor) -> Tensor:  # (T, K) -> (T, N)
        """What one expert makes of every row."""
        bias = None if self.bias is None else self.bias[expert]
        return nn.functional.linear(x.to(self.weight.dtype), self.weight[expert], bias)


class QuantizedExperts(nn.Module):
    """The same with weights of codes, repacked once for the backend that multiplies them."""

    def __init__(self, prepared: PreparedExperts) -> None:
        super().__init__()
        self.prepared = prepared
        self.following: PreparedExperts | None = None
        """What the same block multiplies next by the same groups."""

    def forward(self, x: Tensor | MixedTensor, groups: TokenGroups, top_k: int | None) -> Tensor:
        """As `quatom.ops.experts.expert_linear`: (T k, N) in grouped order."""
        return expert_linear(x, self.prepared, groups, top_k=top_k, following=self.following)


SiteLinear = FloatLinear | QuantizedLinear | FloatExperts | QuantizedExperts
"""What multiplies the input of a site."""
