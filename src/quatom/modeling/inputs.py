"""How the input of a linear is made: what precedes it, fused with reorder and quantization."""

from torch import Tensor, nn

from quatom.families.spec import Norm
from quatom.numerics.groups import GroupLayout, ScaleMode
from quatom.ops.activations import MixedTensor, QuantizeSpec
from quatom.ops.backend import Backend
from quatom.ops.gated import gated
from quatom.ops.gated_quantize import gated_quantize
from quatom.ops.norm import norm
from quatom.ops.norm_quantize import norm_quantize
from quatom.ops.reorder_quantize import reorder_quantize
from quatom.recipe import Recipe


def activation_spec(recipe: Recipe, layout: GroupLayout) -> QuantizeSpec | None:
    """How `recipe` quantizes an input of this layout; None where activations stay as they are."""
    if not recipe.quantizes_activations:
        return None
    return QuantizeSpec(
        layout=layout,
        normal=recipe.activations.format,
        outlier=recipe.outliers.format,
        clip_ratio=recipe.activations.clip_ratio,
        rotate=recipe.activations.rotation == "hadamard",
        scale_mode=_scale_mode(recipe, layout),
    )


def _scale_mode(recipe: Recipe, layout: GroupLayout) -> ScaleMode:
    if layout.num_normal_groups == 1:
        return "group"
    if recipe.activations.group_size == -1:
        return "row"
    return "group" if recipe.activations.scale_format == "float16" else "multiples"


class InputQuantizer(nn.Module):
    """Makes the input shared by the linears of one place in a block (q, k and v; gate and up).

    With a quantize spec it returns a MixedTensor in the byte layout that the spec names, otherwise
    a plain tensor; in both cases with channels in reordered position.
    """

    order: Tensor | None

    def __init__(
        self,
        spec: QuantizeSpec | None,
        order: Tensor | None = None,  # (K,) old channel at each position; None: as they are
        backend: Backend | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.backend = backend
        self.register_buffer("order", None if order is None else order.int(), persistent=False)

    def _reorder(self, x: Tensor) -> Tensor:
        return x if self.order is None else x[:, self.order.long()]

    def norm(
        self,
        x: Tensor,  # (T, K)
        residual: Tensor | None,  # (T, K)
        weight: Tensor,  # (K,)
        eps: float,
    ) -> tuple[Tensor | MixedTensor, Tensor]:
        """RMSNorm of x + residual. Returns the input of the linear and the new residual."""
        if self.spec is None:
            normed, total = norm(
                x, weight, norm=Norm(eps=eps), residual=residual, backend=self.backend
            )
            return self._reorder(normed), total
        return norm_quantize(
            x,
            weight,
            self.order,
            self.spec,
            norm=Norm(eps=eps),
            residual=residual,
            backend=self.backend,
        )

    def plain(self, x: Tensor) -> Tensor | MixedTensor:  # (T, K)
        """The input as it is: attention's output before o_proj."""
        if self.spec is None:
            return self._reorder(x)
        return reorder_quantize(x, self.order, self.spec, backend=self.backend)

    def silu_mul(self, gate_up: Tensor) -> Tensor | MixedTensor:  # (T, 2 K) -> (T, K)
        """silu(gate) * up, in the order that gate's and up's rows already have."""
        if self.spec is None:
            return self._reorder(gated(gate_up, "silu", True, backend=self.backend))
        return gated_quantize(gate_up, self.spec, "silu", True, backend=self.backend)
