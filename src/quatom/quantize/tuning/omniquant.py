"""OmniQuant: clip ratios of weights and factors of channels, learned by gradients.

A group's scale is sigmoid(logit) * absmax / largest code. Channels of inputs are divided by
factors, and keys too, where norms or rows of other linears can take them.

Source: OmniQuant (Shao et al., ICLR 2024), learnable weight clipping and learnable equivalent
transformation; here on a symmetric grid, and without shifts, as its authors do for Llama.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from quatom.errors import RecipeError
from quatom.families.spec import SiteName
from quatom.modeling.weights import FloatLayer, LayerWeights, SiteCodes
from quatom.numerics.formats import get_format
from quatom.numerics.groups import MIN_SCALE, expand_scales, split_groups
from quatom.plan import LayerPlan, SitePlan
from quatom.quantize.transforms.keys import divide_keys
from quatom.quantize.transforms.scaling import FOLD_ORDER, can_fold, fold_division
from quatom.quantize.tuning.straight_through import replace_value, round_through
from quatom.recipe import Recipe
from quatom.recipe_tuning import OmniQuantSpec

FIRST_LOGIT = 4.0
"""Clip ratios begin at sigmoid(4) = 0.982."""


def check_omniquant(recipe: Recipe) -> None:
    """Refuse recipes whose weights are not stored as they are when they are clipped.

    Raises:
        RecipeError: channels are ordered or rotated, or scales are no float16 numbers of their own.
    """
    moved = recipe.outliers.channels > 0 or recipe.activations.rotation != "none"
    if moved or recipe.weights.scale_format != "float16" or recipe.weights.rows_per_scale != 1:
        raise RecipeError(
            "tuning.method 'omniquant' clips groups of channels as they come, each on its own: it "
            "needs outliers.channels 0, activations.rotation 'none', weights.scale_format "
            "'float16' and weights.rows_per_scale 1"
        )


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
            made[f"heads.norms.{index}"] = weight
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


def clip_and_round(
    site: SitePlan,
    weight: Tensor,  # (N, K)
    ratios: Tensor,  # (N, S), of each group's absolute maximum
) -> tuple[Tensor, Tensor]:
    """Codes (N, K) and scales (N, S), both float32, with gradients for weight and ratios."""
    fmt = get_format(site.weights.format)
    absmax = split_groups(weight, site.layout).abs().amax(dim=-1)
    wanted = absmax * ratios / fmt.largest
    scales = replace_value(wanted, wanted.detach().clamp(min=MIN_SCALE).half().float())
    steps = weight.float() / expand_scales(scales, site.layout)
    return round_through(steps).clamp(-1 - fmt.largest, fmt.largest), scales
