"""Divide input channels of linears by factors that the columns of their weights take back.

The division costs nothing at run time: it is folded into what makes the input, a norm's weight or
the rows of another linear. What differs between methods is how the factors are found.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from quatom.families.spec import NormName, SiteName
from quatom.modeling.weights import FloatLayer, NormWeights
from quatom.plan import LayerPlan, SitePlan
from quatom.quantize.transforms.awq import search_factors
from quatom.recipe import ScalingSpec

_NORMS: Mapping[SiteName, NormName] = {"qkv": "attention", "gate_up": "feed_forward"}
"""The norm that makes a site's input."""
FOLD_ORDER: tuple[SiteName, ...] = ("o", "down", "qkv", "gate_up")
"""Sites whose factors change the rows of others come first: those are judged as they will be."""


def scale_channels(
    layer: LayerPlan, weights: FloatLayer, statistics: Mapping[str, Tensor], spec: ScalingSpec
) -> FloatLayer:
    """Every site that the method scales, and whose input can take the division.

    Inputs that routed experts read stay as they are: the router reads the same, and the rows that
    make the input of an expert's down projection are its own.
    """
    for name in (name for name in FOLD_ORDER if name in layer.sites):
        if spec.method == "smoothquant" and name not in _NORMS:
            continue  # published for the inputs that a norm makes
        if can_fold(layer, name):
            parts = [weights.sites[reader].weight for reader in readers(layer, name)]
            weight = parts[0] if len(parts) == 1 else torch.cat(parts)
            factor = _factors(layer.sites[name], weight, statistics, spec)
            weights = fold_division(layer, weights, name, factor)
    return weights


def can_fold(layer: LayerPlan, site: SiteName) -> bool:
    """Whether what makes a site's input can divide its channels, each by a factor of its own."""
    if site == "gate_up" and layer.spec.experts is not None:
        return False  # a shared expert reads what the router and the experts read
    if site == "gate_up" and layer.spec.shares_norm:
        return False  # its input is divided with that of q, k and v, which is the same
    if site in _NORMS:
        return _NORMS[site] in layer.spec.norms
    if site == "down":
        feed_forward = layer.spec.feed_forward
        assert feed_forward is not None  # or there would be no such site
        return feed_forward.linear_in_up or feed_forward.activation == "relu"
    attention = layer.spec.attention
    own_values = attention.num_heads == attention.num_kv_heads
    return own_values and layer.kv_cache.value_rotation == "none"


def readers(layer: LayerPlan, site: SiteName) -> tuple[SiteName, ...]:
    """Sites that read the input of one: their columns take its factors."""
    return ("qkv", "gate_up") if site == "qkv" and layer.spec.shares_norm else (site,)


def _factors(
    site: SitePlan, weight: Tensor, statistics: Mapping[str, Tensor], spec: ScalingSpec
) -> Tensor:  # (K,) float32
    if spec.method == "balanced":
        return balanced_factors(statistics[f"second_moment.{site.name}"], weight, spec.strength)
    if spec.method == "smoothquant":
        return smooth_factors(statistics[f"absmax.{site.name}"], weight, spec.strength)
    return search_factors(
        site,
        weight,
        statistics[f"abs_mean.{site.name}"],
        statistics[f"moments.{site.name}"],
        spec.strength,
    )


def balanced_factors(squares: Tensor, weight: Tensor, strength: float) -> Tensor:
    """(E[x**2] / E[w**2])**(strength / 4), geometric mean 1; (K,) of `squares` (K,).

    At strength 1 the errors that rounding leaves on the input and on the weight weigh alike.
    """
    energy = weight.float().square().mean(dim=0)
    alive = (squares > 0) & (energy > 0)
    ratio = torch.where(alive, squares / energy, torch.ones_like(squares)).log2()
    mean = ratio[alive].mean() if bool(alive.any()) else ratio.new_zeros(())
    return torch.where(alive, (ratio - mean) * (strength / 4), torch.zeros_like(ratio)).exp2()


def smooth_factors(absmax: Tensor, weight: Tensor, strength: float) -> Tensor:
    """max|x|**strength / max|w|**(1 - strength), (K,) of `absmax` (K,).

    Source: SmoothQuant (Xiao et al., ICML 2023), equation 4.
    """
    largest = weight.float().abs().amax(dim=0)
    alive = (absmax > 0) & (largest > 0)
    factor = absmax.pow(strength) / largest.pow(1 - strength)
    return torch.where(alive, factor, torch.ones_like(factor))


def fold_division(
    layer: LayerPlan,
    weights: FloatLayer,
    site: SiteName,
    factor: Tensor,  # (K,) float32
) -> FloatLayer:
    """The layer whose site reads its input divided by `factor`, with the same output."""
    if site in _NORMS:
        weights, factor = _divide_norm(layer, weights, _NORMS[site], factor)
    else:
        attention = layer.spec.attention
        maker: SiteName = "gate_up" if site == "down" else "qkv"
        # Values come last in q, k, v, and up after gate.
        weights = _divide_last_rows(weights, maker, factor)
        assert site == "down" or factor.numel() == attention.kv_size
    scaled = {}
    for reader in readers(layer, site):
        held = weights.sites[reader]
        columns = (held.weight.float() * factor).to(held.weight.dtype)
        scaled[reader] = replace(held, weight=columns, divided_by=factor)
    return replace(weights, sites={**weights.sites, **scaled})


def _divide_norm(
    layer: LayerPlan, weights: FloatLayer, name: NormName, factor: Tensor
) -> tuple[FloatLayer, Tensor]:
    """The norm's output divided, and by how much exactly: its weight is rounded to its dtype."""
    norm, offset = weights.norms[name], layer.spec.norms[name].weight_offset
    before = norm.weight.float() + offset
    weight = (before / factor - offset).to(norm.weight.dtype)
    after = weight.float() + offset
    exact = torch.where((before == 0) | (after == 0), torch.ones_like(factor), before / after)
    weight = torch.where(exact == 1, norm.weight, weight)
    bias = None if norm.bias is None else (norm.bias.float() / exact).to(norm.bias.dtype)
    norms = {**weights.norms, name: NormWeights(weight, bias)}
    return replace(weights, norms=norms), exact


def _divide_last_rows(weights: FloatLayer, site: SiteName, factor: Tensor) -> FloatLayer:
    """The last rows of a joined weight, and of its bias, divided."""
    held, count = weights.sites[site], factor.numel()

    def divide(rows: Tensor, by: Tensor) -> Tensor:
        return torch.cat((rows[:-count], (rows[-count:].float() / by).to(rows.dtype)))

    bias = None if held.bias is None else divide(held.bias, factor)
    scaled = replace(held, weight=divide(held.weight, factor.unsqueeze(1)), bias=bias)
    return replace(weights, sites={**weights.sites, site: scaled})
