"""QLLM's error correction: a product of two thin matrices for each weight, learned by gradients.

W + U D is rounded to nearest, U (N, r) and D (r, K). U begins at zero, so that the first loss is
that of the rounded weight itself. Only the rounded sum is stored.

Source: QLLM (Liu et al., ICLR 2024), efficient gradient-based error correction.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from quatom.families.spec import SiteName
from quatom.modeling.weights import FloatLayer, LayerWeights, SiteCodes
from quatom.numerics.groups import expand_scales
from quatom.plan import LayerPlan
from quatom.quantize.tuning.nearest import clip_and_round
from quatom.recipe_tuning import LowRankSpec


class LearnedCorrections(nn.Module):
    """A whole layer."""

    def __init__(
        self, layer: LayerPlan, floats: FloatLayer, spec: LowRankSpec, seed: int = 0
    ) -> None:
        super().__init__()
        self.layer, self.floats, self.spec = layer, floats, spec
        self.up = nn.ParameterDict()
        self.down = nn.ParameterDict()
        generator = torch.Generator().manual_seed(seed)  # on the CPU, for the same numbers anywhere
        for name, site in layer.sites.items():
            device = floats.sites[name].weight.device
            thin = torch.randn(spec.rank, site.channels, generator=generator)
            self.down[name] = (thin / site.channels**0.5).to(device)
            self.up[name] = torch.zeros(site.rows, spec.rank, device=device)

    def groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """See `quatom.quantize.tuning.descent.Learned`."""
        return [([*self.up.values(), *self.down.values()], self.spec.rate)]

    def project(self) -> None:
        """Every value can be stored."""

    def tensors(self) -> dict[str, Tensor]:
        """See `quatom.quantize.tuning.descent.Learned`."""
        made = {}
        for name, held in self.floats.sites.items():
            values, scales = self._rounded(name)
            weight = values * expand_scales(scales, self.layer.sites[name].layout)
            made[f"linears.{name}.weight"] = weight.to(held.weight.dtype)
        return made

    @torch.no_grad()
    def finish(self, rounded: LayerWeights) -> LayerWeights:
        """What is stored of the layer that `rounded` was."""
        sites = {}
        for name, held in self.floats.sites.items():
            values, scales = self._rounded(name)
            sites[name] = SiteCodes(values, scales.half(), held.bias, held.order)
        return replace(rounded, sites=sites)

    def _rounded(self, name: SiteName) -> tuple[Tensor, Tensor]:
        site, weight = self.layer.sites[name], self.floats.sites[name].weight.float()
        corrected = weight + self.up[name] @ self.down[name]
        return clip_and_round(site, corrected, weight.new_tensor(site.weights.clip_ratio))
