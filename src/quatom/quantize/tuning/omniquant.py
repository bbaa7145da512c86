"""OmniQuant: clip ratios of weights and factors of channels, learned by gradients.

A group's scale is sigmoid(logit) * absmax / largest code. Channels of inputs are divided by
factors, and keys too, where norms or rows of other linears can take them.

Source: OmniQuant (Shao et al., ICLR 2024), learnable weight clipping and learnable equivalent
transformation; here on a symmetric grid, and without shifts, as its authors do for Llama.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from quatom.families.spec import SiteName
from quatom.modeling.weights import FloatLayer, LayerWeights, SiteCodes
from quatom.numerics.groups import expand_scales
from quatom.plan import LayerPlan
from quatom.quantize.transforms.keys import divide_keys
from quatom.quantize.transforms.scaling import FOLD_ORDER, can_fold, fold_division
from quatom.quantize.tuning.nearest import clip_and_round
from quatom.recipe_tuning import OmniQuantSpec

FIRST_LOGIT = 4.0
"""Clip ratios begin at sigmoid(4) = 0.982."""


class LearnedTransforms(nn.Module):
    """A whole layer."""

    def __init__(self, layer: LayerPlan, floats: FloatLayer, spec: OmniQuantSpec) -> None:
        super().__init__()
        self.layer, self.floats, self.spec = layer, floats, spec
        self.logits = nn.ParameterDict()
        self.factors = nn.ParameterDict()  # logarithms
        for name, site in layer.sites.items():
            weight = floats.sites[name].weight
            self.logits[name] = torch.full(
                (site.rows, site.layout.num_scales), FIRST_LOGIT, device=weight.device
            )
            if can_fold(layer, name):
                self.factors[name] = torch.zeros(site.channels, device=weight.device)
        attention = layer.spec.attention
        device = floats.sites["qkv"].weight.device
        pairs = torch.zeros(attention.num_kv_heads, attention.head_dim // 2, device=device)
        self.keys = nn.Parameter(pairs)

    def groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """See `quatom.quantize.tuning.descent.Learned`."""
        factors = [*self.factors.values(), self.keys]
        return [(list(self.logits.values()), self.spec.clip_rate), (factors, self.spec.factor_rate)]

    def project(self) -> None:
        """Every value can be stored."""

    def tensors(self) -> dict[str, Tensor]:
        """See `quatom.quantize.tuning.descent.Learned`."""
        layer = self._divided()
        made = {f"norms.{name}.weight": norm.weight for name, norm in layer.norms.items()}
        for name, held in layer.sites.items():
            values, scales = self._rounded(name, held.weight)
            weight = values * expand_scales(scales, self.layer.sites[name].layout)
            made[f"linears.{name}.weight"] = weight.to(held.weight.dtype)
            if held.bias is not None:
                made[f"linears.{name}.bias"] = held.bias
        for index, weight in enumerate(layer.qk_norm or ()):
            made[f"heads.weights.{index}"] = weight
        if layer.key_offset is not None:
            made["key_offset"] = layer.key_offset
        return made

    @torch.no_grad()
    def finish(self, rounded: LayerWeights) -> LayerWeights:
        """What is stored of the layer that `rounded` was."""
        layer = self._divided()
        sites = {}
        for name, held in layer.sites.items():
            values, scales = self._rounded(name, held.weight)
            sites[name] = SiteCodes(values, scales.half(), held.bias, held.order)
        return replace(
            rounded,
            norms=layer.norms,
            sites=sites,
            qk_norm=layer.qk_norm,
            key_offset=layer.key_offset,
        )

    def _divided(self) -> FloatLayer:
        """The layer with all factors folded."""
        weights = self.floats
        for name in (name for name in FOLD_ORDER if name in self.factors):
            weights = fold_division(self.layer, weights, name, self.factors[name].exp())
        return divide_keys(self.layer, weights, self.keys.exp().repeat(1, 2))

    def _rounded(self, name: SiteName, weight: Tensor) -> tuple[Tensor, Tensor]:
        return clip_and_round(self.layer.sites[name], weight, self.logits[name].sigmoid())
