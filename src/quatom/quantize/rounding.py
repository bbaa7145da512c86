"""Round the joined weights of sites as the recipe says."""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from quatom.errors import QuantizationError
from quatom.families.spec import SiteName
from quatom.modeling.weights import FloatSite, SiteCodes
from quatom.numerics.descent import coordinate_descent
from quatom.numerics.formats import get_format
from quatom.numerics.rounding import (
    RoundedWeight,
    RoundingOptions,
    gptq,
    round_to_nearest,
    shift_to_target,
)
from quatom.plan import LayerPlan, SitePlan
from quatom.quantize.lanes import Share
from quatom.quantize.loops import (
    choose_round_columns,
    choose_visit_columns,
    choose_weight_scales,
)
from quatom.recipe import GPTQSpec, Recipe


class Rounder(Protocol):
    """Turns a weight into codes."""

    def __call__(
        self,
        site: SitePlan,
        weight: Tensor,  # (N, K) in reordered position
        moment: Tensor | None,  # (K, K) second moments of the inputs
    ) -> RoundedWeight:
        """Codes and scales.

        Raises:
            QuantizationError: the moments cannot be used, or the result is not finite.
        """


def rounder_of(recipe: Recipe) -> Rounder:
    """The rounder that a recipe names."""
    return _gptq if isinstance(recipe.weights.rounder, GPTQSpec) else _nearest


def _nearest(site: SitePlan, weight: Tensor, moment: Tensor | None) -> RoundedWeight:
    return round_to_nearest(weight, site.layout, rounding_options(site, weight), moment)


def _gptq(site: SitePlan, weight: Tensor, moment: Tensor | None) -> RoundedWeight:
    if moment is None:
        return _nearest(site, weight, moment)
    spec, options, layout = site.weights.rounder, rounding_options(site, weight), site.layout
    assert isinstance(spec, GPTQSpec)
    formats, sweeps = options.formats(layout), spec.descent_sweeps
    round_block = choose_round_columns(weight.device, formats)
    rounded = gptq(weight, layout, options, moment, round_block)
    if sweeps == 0:
        return rounded
    visit = choose_visit_columns(weight.device, formats)
    return coordinate_descent(weight, rounded, formats, moment, spec.damping, sweeps, visit)


def rounding_options(
    site: SitePlan, weight: Tensor, *, clip_search: str | None = None
) -> RoundingOptions:
    """How a site's weight is rounded; `clip_search` in place of the recipe's."""
    spec = site.weights
    gptq = spec.rounder if isinstance(spec.rounder, GPTQSpec) else GPTQSpec()
    return RoundingOptions(
        normal=get_format(spec.format),
        outlier=get_format(site.outliers.format),
        clip_ratio=spec.clip_ratio,
        clip_search=clip_search or spec.clip_search,
        rows_per_scale=spec.rows_per_scale,
        damping=gptq.damping,
        column_order=gptq.column_order,
        scale_format=spec.scale_format,
        find_scales=choose_weight_scales(weight.device),
    )


@dataclass(frozen=True, slots=True)
class RoundedSite:
    """The joined weight of a site after rounding, and its relative output error."""

    weight: RoundedWeight
    relative_error: float
    nearest: bool = False
    """Rounded to nearest because its second moments could not be inverted."""


@dataclass(frozen=True, slots=True)
class RoundedExperts:
    """The joined weights of a site of routed experts after rounding."""

    values: Tensor  # (E, N, K) in units of the scales, int8 where all formats are integers
    scales: Tensor  # (E, N, S) float16
    relative_errors: list[float]
    """Of each expert."""
    nearest: list[bool]
    """Of each expert, as in `RoundedSite`."""


def round_site(
    site: SitePlan,
    weight: Tensor,  # (N, K) in reordered position
    moment: Tensor | None,  # (K, K)
    target: Tensor | None,  # (N, K) target outputs times inputs; None: the weight's own output
    recipe: Recipe,
) -> RoundedSite:
    """Round a weight with the recipe's rounder, and measure what that cost.

    Raises:
        QuantizationError: the second moments cannot be inverted and the recipe says to stop, or
            the result is not finite.
    """
    spec, nearest = site.weights.rounder, False
    try:
        if target is not None:
            assert moment is not None
            assert isinstance(spec, GPTQSpec)
            weight = shift_to_target(weight, moment, target, spec.damping, spec.float_target)
        rounded = rounder_of(recipe)(site, weight, moment)
    except QuantizationError as error:
        if not isinstance(spec, GPTQSpec):
            raise QuantizationError(f"{site.title}: {error}") from error
        if spec.on_singular == "error":
            raise QuantizationError(
                f"{site.title}: {error}; give more calibration text, raise weights.rounder.damping "
                f"(now {spec.damping}), or allow weights.rounder.on_singular 'nearest'"
            ) from error
        rounded, nearest = _nearest(site, weight, moment), True
    return RoundedSite(rounded, _relative_error(weight, rounded, moment), nearest)


def round_experts(
    site: SitePlan,
    weights: Tensor,  # (E, N, K) in reordered position, of each expert
    moments: Tensor | None,  # (E, K, K)
    recipe: Recipe,
) -> RoundedExperts:
    """Round the weight of every expert on its own, with second moments of its own.

    Raises:
        QuantizationError: as `round_site`; the message names the expert.
    """
    formats = (site.weights.format, site.outliers.format) if site.layout.outliers else ()
    small = all(get_format(name).is_integer for name in (site.weights.format, *formats))
    values = weights.new_empty(weights.shape, dtype=torch.int8 if small else torch.float32)
    scales, errors, nearest = [], [], []
    for expert, weight in enumerate(weights):
        named = replace(site, title=f"{site.title} of expert {expert}")
        moment = None if moments is None else moments[expert]
        rounded = round_site(named, weight, moment, None, recipe)
        values[expert] = rounded.weight.values
        scales.append(rounded.weight.scales)
        errors.append(rounded.relative_error)
        nearest.append(rounded.nearest)
    return RoundedExperts(values, torch.stack(scales), errors, nearest)


def round_layer(
    layer: LayerPlan,
    floats: dict[SiteName, FloatSite],
    moments: dict[str, Tensor],
    targets: dict[str, Tensor],
    recipe: Recipe,
    share: Share,
    device: torch.device,
) -> tuple[dict[SiteName, SiteCodes], dict[str, float], Tensor | None]:
    """Codes of every site, the relative error of each, and the experts rounded to nearest.

    Each process rounds the sites that it owns, and all get all codes. What a site was made from
    leaves `floats`, `moments` and `targets` as its codes come: at no time is the block in memory
    several times over.

    Raises:
        QuantizationError: as `round_site`.
    """
    ranks, rounded = share.ranks, dict[SiteName, dict[str, Tensor]]()
    rest = {name: (held.bias, held.order) for name, held in floats.items()}
    with ranks.together():
        for name, site in layer.sites.items():
            weight = floats.pop(name).weight
            if share.owner(layer, name) == ranks.rank:
                moment, target = moments.pop(name, None), targets.pop(name, None)
                rounded[name] = _tensors_of(site, weight, moment, target, recipe)
            del weight
    codes: dict[SiteName, SiteCodes] = {}
    errors: dict[str, float] = {}
    nearest: Tensor | None = None
    for name, site in layer.sites.items():
        found = ranks.from_rank(rounded.pop(name, {}), share.owner(layer, name), device)
        codes[name] = SiteCodes(found["values"], found["scales"], *rest[name])
        errors[name] = float(found["error"])
        if site.experts is not None:
            nearest = found["nearest"] if nearest is None else nearest | found["nearest"]
    return codes, errors, None if nearest is None else nearest.bool()


def _tensors_of(
    site: SitePlan,
    weight: Tensor,
    moment: Tensor | None,  # (K, K), or (E, K, K)
    target: Tensor | None,  # (N, K)
    recipe: Recipe,
) -> dict[str, Tensor]:
    """A rounded site in a form that can be sent; `nearest` (E,) uint8 of routed experts."""
    if site.experts is None:
        one = round_site(site, weight, moment, target, recipe)
        error = torch.tensor(one.relative_error, dtype=torch.float64)
        return {"values": one.weight.values, "scales": one.weight.scales, "error": error}
    each = round_experts(site, weight, moment, recipe)
    return {
        "values": each.values,
        "scales": each.scales,
        "error": torch.tensor(each.relative_errors).square().mean().sqrt(),
        "nearest": torch.tensor(each.nearest, dtype=torch.uint8),
    }


def _relative_error(weight: Tensor, rounded: RoundedWeight, moment: Tensor | None) -> float:
    """||(W - Q) X|| / ||W X|| over the calibration inputs, or of the weights alone."""
    weight = weight.float()
    error = weight - rounded.dequantize()
    if moment is None:
        cost, size = error.square().sum(), weight.square().sum()
    else:
        cost, size = ((error @ moment) * error).sum(), ((weight @ moment) * weight).sum()
    # Inputs or weights that are all zero lose nothing; 0 / 0 would be a NaN in the report.
    return max((cost / size).item(), 0.0) ** 0.5 if size > 0 else 0.0
