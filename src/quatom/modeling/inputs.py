"""How the input of a linear is made: what precedes it, fused with reorder and quantization."""

from torch import Tensor, nn

from quatom.families.spec import FeedForward, Norm
from quatom.modeling.weights import NormWeights
from quatom.numerics.incoherence import Rotation
from quatom.ops.activations import MixedTensor, QuantizeSpec
from quatom.ops.backend import Backend
from quatom.ops.experts.groups import ExpertSum, summed
from quatom.ops.gated import gated
from quatom.ops.gated_quantize import gated_quantize
from quatom.ops.norm import norm
from quatom.ops.norm_quantize import norm_and_quantize, norm_quantize
from quatom.ops.reorder_quantize import reorder_quantize


class NormLayer(nn.Module):
    """A norm with its parameters."""

    bias: Tensor | None

    def __init__(self, spec: Norm, weights: NormWeights, backend: Backend | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.backend = backend
        self.weight = nn.Parameter(weights.weight, requires_grad=False)
        self.register_buffer("bias", weights.bias, persistent=False)

    def forward(
        self,
        x: Tensor,  # (T, K)
        residual: Tensor | None = None,  # (T, K)
    ) -> tuple[Tensor, Tensor]:
        """The normalized sum of x and residual, and the sum."""
        return norm(
            x,
            self.weight,
            norm=self.spec,
            bias=self.bias,
            residual=residual,
            backend=self.backend,
        )


class InputQuantizer(nn.Module):
    """Makes the input that the linears of one site share (q, k and v; gate and up).

    With a quantize spec it returns a MixedTensor in the byte layout that the spec names, otherwise
    a plain tensor, rotated where the recipe says so; in both cases with channels in reordered
    position.
    """

    order: Tensor | None

    def __init__(
        self,
        spec: QuantizeSpec | None,
        order: Tensor | None = None,  # (K,) old channel at each position; None: as they are
        backend: Backend | None = None,
        rotation: Rotation | None = None,  # of K channels; with a quantize spec there is none
    ) -> None:
        super().__init__()
        self.spec = spec
        self.backend = backend
        self.rotation = rotation
        self.register_buffer("order", None if order is None else order.int(), persistent=False)

    def arrange(self, x: Tensor) -> Tensor:  # (T, K)
        """Channels in reordered position, rotated where the recipe says so; not quantized."""
        x = x if self.order is None else x[:, self.order.long()]
        return x if self.rotation is None else self.rotation.apply(x).to(x.dtype)

    def norm(
        self,
        x: Tensor | ExpertSum,  # (T, K)
        residual: Tensor | None,  # (T, K)
        layer: NormLayer | None,
    ) -> tuple[Tensor | MixedTensor, Tensor]:
        """X + residual, normalized where there is a norm. Returns the linears' input and the sum.

        The sum is the residual of what comes next.
        """
        if layer is None:
            x = summed(x)
            total = x if residual is None else x + residual
            return self.plain(total), total
        if self.spec is None:
            normed, total = layer(summed(x), residual)
            return self.arrange(normed), total
        return norm_quantize(
            x,
            layer.weight,
            self.order,
            self.spec,
            norm=layer.spec,
            bias=layer.bias,
            residual=residual,
            backend=self.backend,
        )

    def norm_kept(
        self,
        x: Tensor,  # (T, K)
        residual: Tensor,  # (T, K)
        layer: NormLayer,
    ) -> tuple[Tensor | MixedTensor, Tensor, Tensor]:
        """As `norm`, with the normalized tokens (T, K) before reorder and quantization.

        What is quantized is those as they are rounded: this is `plain` of them, in fewer launches.
        """
        if self.spec is None:
            normed, total = layer(x, residual)
            return self.arrange(normed), normed, total
        return norm_and_quantize(
            x,
            layer.weight,
            self.order,
            self.spec,
            norm=layer.spec,
            bias=layer.bias,
            residual=residual,
            backend=self.backend,
        )

    def plain(self, x: Tensor) -> Tensor | MixedTensor:  # (T, K)
        """The input as it is: attention's output before o_proj."""
        if self.spec is None:
            return self.arrange(x)
        return reorder_quantize(x, self.order, self.spec, backend=self.backend)

    def activate(self, x: Tensor, spec: FeedForward) -> Tensor | MixedTensor:
        """activation(gate) * up of x (T, 2 K), or activation(x) of x (T, K): (T, K).

        Channels come in reordered position: the rows that make them are stored so.
        """
        if self.spec is None:
            return self.arrange(gated(x, spec.activation, spec.gated, backend=self.backend))
        return gated_quantize(x, self.spec, spec.activation, spec.gated, backend=self.backend)
