"""Rounding to the nearest code with gradients, for methods that change weights and not codes."""

from torch import Tensor

from quatom.errors import RecipeError
from quatom.numerics.formats import get_format
from quatom.numerics.groups import MIN_SCALE, expand_scales, split_groups
from quatom.plan import SitePlan
from quatom.quantize.tuning.straight_through import replace_value, round_through
from quatom.recipe import NearestSpec, Recipe
from quatom.recipe_tuning import LowRankSpec, OmniQuantSpec


def check_nearest(recipe: Recipe, tuning: OmniQuantSpec | LowRankSpec) -> None:
    """Refuse recipes whose weights a method would round in another way than the recipe says.

    Raises:
        RecipeError: a field would be disregarded.
    """
    weights = recipe.weights
    needed = {
        "weights.rounder.method 'nearest'": isinstance(weights.rounder, NearestSpec),
        "weights.scale_format 'float16'": weights.scale_format == "float16",
        "weights.rows_per_scale 1": weights.rows_per_scale == 1,
        "outliers.channels 0": recipe.outliers.channels == 0,
    }
    if isinstance(tuning, OmniQuantSpec):  # it divides channels of inputs that come as they are
        needed |= {
            "weights.groups 'consecutive'": weights.groups == "consecutive",
            "activations.rotation 'none'": recipe.activations.rotation == "none",
            "channel_splitting null": recipe.channel_splitting is None,
        }
    if missing := [name for name, fits in needed.items() if not fits]:
        raise RecipeError(
            f"tuning.method {tuning.method!r} rounds changed weights to nearest, each group with "
            f"a float16 scale of its own: it needs {', '.join(missing)}"
        )


def clip_and_round(
    site: SitePlan,
    weight: Tensor,  # (N, K)
    ratios: Tensor,  # (N, S), or one for all, of each group's absolute maximum
) -> tuple[Tensor, Tensor]:
    """Codes (N, K) and scales (N, S), both float32, with gradients for weight and ratios."""
    fmt = get_format(site.weights.format)
    absmax = split_groups(weight, site.layout).abs().amax(dim=-1)
    wanted = absmax * ratios / fmt.largest
    scales = replace_value(wanted, wanted.detach().clamp(min=MIN_SCALE).half().float())
    steps = weight.float() / expand_scales(scales, site.layout)
    return round_through(steps).clamp(-1 - fmt.largest, fmt.largest), scales
