"""Fields that would say nothing beside the rest of a recipe; to set them is an error.

A field at its default is not set: files and checkpoints spell all of them out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any

from quatom.errors import RecipeError


@dataclass(frozen=True, slots=True)
class _Idle:
    beside: str
    """What makes them say nothing, in words of the recipe."""
    holds: Callable[[Any], bool]
    names: Sequence[str]


_CLIPPING = ("weights.clip_ratio", "weights.clip_search")
_OUTLIERS = ("outliers.max_fraction", "outliers.format")
_RULES = (
    _Idle(
        "weights.format 'float16'",
        lambda recipe: not recipe.quantizes_weights,
        (
            *_CLIPPING,
            *("weights.groups", "weights.rows_per_scale", "weights.rounder"),
            *("outliers.channels", *_OUTLIERS, "outliers.metric"),
        ),
    ),
    _Idle(
        "activations.format 'float16'",
        lambda recipe: not recipe.quantizes_activations,
        ("activations.clip_ratio", "activations.rotation"),
    ),
    _Idle(
        "kv_cache.format 'float16'",
        lambda recipe: recipe.kv_cache.format == "float16",
        ("kv_cache.clip_ratio",),
    ),
    _Idle("outliers.channels 0", lambda recipe: recipe.outliers.channels == 0, _OUTLIERS),
    _Idle(
        "outliers.channels 0 and weights.groups 'consecutive'",
        lambda recipe: not recipe.orders_channels,
        ("outliers.metric",),
    ),
    _Idle(
        "channel_splitting, which finds the order by its own search",
        lambda recipe: recipe.channel_splitting is not None,
        ("outliers.metric",),
    ),
    _Idle(
        "tuning.method 'omniquant', which learns clip ratios and rounds to nearest",
        lambda recipe: recipe.tuning is not None and recipe.tuning.method == "omniquant",
        (*_CLIPPING, "weights.rounder"),
    ),
    _Idle(
        "tuning.method 'low_rank', which rounds to nearest",
        lambda recipe: recipe.tuning is not None and recipe.tuning.method == "low_rank",
        ("weights.clip_search", "weights.rounder"),
    ),
)


def check_idle(recipe: Any) -> None:
    """Refuse fields of a `quatom.Recipe` that are set and say nothing.

    Raises:
        RecipeError: there is one; the message has its name, and what it would need.
    """
    for rule in _RULES:
        if not rule.holds(recipe):
            continue
        for name in rule.names:
            part, field = name.split(".")
            spec = getattr(recipe, part)
            if _is_set(spec, field):
                raise RecipeError(
                    f"{name} {_shown(getattr(spec, field))} has no effect with "
                    f"{rule.beside}: leave {name} out, or change that"
                )


def _has_options(value: Any) -> bool:
    """Whether a value is an object with a method."""
    return is_dataclass(value)


def _is_set(spec: Any, field: str) -> bool:
    value = getattr(spec, field)
    if _has_options(value):  # either method may be named, its options may not be set
        return bool(value != type(value)())
    # No outliers is what float weights have anyway.
    return bool(value not in (getattr(type(spec)(), field), *([0] if field == "channels" else [])))


def _shown(value: Any) -> str:
    return f"with options of {value.method}" if _has_options(value) else repr(value)
