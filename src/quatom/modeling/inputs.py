"""How the input of a linear is made: what precedes it, fused with reorder and quantization."""

import torch
from torch import Tensor, nn

from quatom.numerics.formats import get_format
from quatom.numerics.groups import GroupLayout
from quatom.ops.activations import MixedTensor
from quatom.ops.backend import Backend
from quatom.ops.reorder_quantize import reorder_quantize
from quatom.ops.rmsnorm_quantize import rmsnorm_quantize
from quatom.ops.silu_quantize import silu_quantize
from quatom.recipe import Recipe


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:  # (T, K), (K,) -> (T, K)
    """x / sqrt(mean(x**2) + eps) * weight, statistics in float32."""
    scale = torch.rsqrt(x.float().square().mean(dim=-1, keepdim=True) + eps)
    return (x.float() * scale).to(x.dtype) * weight


class InputQuantizer(nn.Module):
    """Makes the input shared by the linears of one place in a block (q, k and v; gate and up).

    With a recipe that quantizes activations it returns a MixedTensor in the backend's own layout,
    otherwise a plain tensor; in both cases with channels in reordered position.
    """

    def __init__(
        self,
        recipe: Recipe,
        layout: GroupLayout,
        order: Tensor | None = None,  # (K,) old channel at each position; None: as they are
        backend: Backend | None = None,
    ) -> None:
        super().__init__()
        self.quantizes = recipe.quantizes_activations
        self.layout = layout
        self.normal = get_format(recipe.activations.format)
        self.outlier = get_format(recipe.outliers.format)
        self.clip_ratio = recipe.activations.clip_ratio
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
        if not self.quantizes:
            residual = x if residual is None else x + residual
            return self._reorder(rms_norm(residual, weight, eps)), residual
        return rmsnorm_quantize(
            x,
            weight,
            self.layout,
            residual=residual,
            order=self.order,
            normal_format=self.normal,
            outlier_format=self.outlier,
            clip_ratio=self.clip_ratio,
            eps=eps,
            backend=self.backend,
        )

    def plain(self, x: Tensor) -> Tensor | MixedTensor:  # (T, K)
        """The input as it is: attention's output before o_proj."""
        if not self.quantizes:
            return self._reorder(x)
        return reorder_quantize(
            x,
            self.layout,
            order=self.order,
            normal_format=self.normal,
            outlier_format=self.outlier,
            clip_ratio=self.clip_ratio,
            backend=self.backend,
        )

    def silu_mul(self, gate_up: Tensor) -> Tensor | MixedTensor:  # (T, 2 K) -> (T, K)
        """silu(gate) * up, in the order that gate's and up's rows already have."""
        if not self.quantizes:
            gate, up = gate_up.chunk(2, dim=-1)
            return nn.functional.silu(gate) * up
        return silu_quantize(
            gate_up,
            self.layout,
            normal_format=self.normal,
            outlier_format=self.outlier,
            clip_ratio=self.clip_ratio,
            backend=self.backend,
        )
