"""Linears whose weights are rotated on both sides: the rotations of a site, and what undoes them.

Rotations are no tensors of a checkpoint: the recipe's seed and the names of sites and linears give
them.
"""

import torch
from torch import Tensor, nn

from quatom.modeling.linear import FloatExperts, SiteLinear
from quatom.numerics.incoherence import Rotation, rotation
from quatom.ops.activations import MixedTensor
from quatom.plan import SitePlan


def input_rotation(site: SitePlan, device: torch.device) -> Rotation | None:
    """V of K channels that multiplies a site's input; None where the recipe has none."""
    if site.incoherence is None:
        return None
    return rotation(site.incoherence.seed, site.title, site.channels, device)


def output_rotations(site: SitePlan, device: torch.device) -> tuple[Rotation, ...]:
    """U of the rows of each linear of a site; none where the recipe has none."""
    if site.incoherence is None:
        return ()
    seed = site.incoherence.seed
    return tuple(rotation(seed, linear.name, linear.rows, device) for linear in site.linears)


class RotatedLinear(nn.Module):
    """Undoes the rotations of a linear's output: y = U^T linear(x), linear by linear of a site."""

    def __init__(self, linear: SiteLinear, outputs: tuple[Rotation, ...]) -> None:
        super().__init__()
        self.linear = linear
        self.outputs = outputs

    def forward(self, x: Tensor | MixedTensor, *routing: object) -> Tensor:  # (..., K) -> (..., N)
        """Multiply, and rotate back; `routing` is what linears of routed experts take."""
        return self._undo(self.linear(x, *routing))

    def of_expert(self, expert: int, x: Tensor) -> Tensor:  # (T, K) -> (T, N)
        """As `FloatExperts.of_expert`."""
        assert isinstance(self.linear, FloatExperts)
        return self._undo(self.linear.of_expert(expert, x))

    def _undo(self, y: Tensor) -> Tensor:
        parts = y.split([rotation.signs.numel() for rotation in self.outputs], dim=-1)
        pairs = zip(self.outputs, parts, strict=True)
        return torch.cat([rotation.undo(part) for rotation, part in pairs], dim=-1).to(y.dtype)
