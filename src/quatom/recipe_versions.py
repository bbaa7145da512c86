"""Recipes of older format versions, rewritten as the present version spells them."""

from collections.abc import Mapping
from typing import Any

from quatom.errors import RecipeError

FORMAT_VERSION = 3
"""Version of the checkpoint format. Version 1 had no packed multiples, channel scaling, weighted
keys or descent. In versions 1 and 2 the options of a method were fields of their own, valid only
beside that method."""

_GPTQ = {
    "rounding": "method",
    "damping": "damping",
    "column_order": "column_order",
    "descent_sweeps": "descent_sweeps",
}
_KEYS = {"keys": "method", "rotation": "rotation", "key_offset": "offset"}
"""Older names of fields, and what they are called in the object that they moved into."""
_IDLE = {"column_order": "stored", "descent_sweeps": 0, "rotation": "none", "offset": "none"}
"""What older recipes say of options of another method; other values were refused."""


def to_current(data: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe, or the fields of one that a file gives, in the present version.

    Without `format_version` either spelling is read: files that people write have none.

    Raises:
        RecipeError: the format version is newer than this library.
    """
    version = data.get("format_version", 1)
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise RecipeError(
            f"recipe has format_version {version}, this Quatom reads up to {FORMAT_VERSION}; "
            "upgrade Quatom"
        )
    if type(version) is not int or not 0 < version < FORMAT_VERSION:
        return dict(data)
    # Other fields that a version added have defaults that mean what was there before.
    return _nested(data) | {"format_version": FORMAT_VERSION}


def _nested(data: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a method moved into the object of that method."""
    made = dict(data)
    scaling = made.get("channel_scaling")
    if isinstance(scaling, dict) and scaling.get("method") == "none":
        made["channel_scaling"] = None
    if isinstance(cache := made.get("kv_cache"), dict) and not isinstance(cache.get("keys"), dict):
        made["kv_cache"] = _gathered(cache, _KEYS, "keys", "pre_rope")
    weights = made.get("weights", {})
    if isinstance(weights, dict) and "rounder" not in weights:
        made |= {"weights": _with_rounder(dict(weights), made.pop("on_singular", None))}
    return made


def _with_rounder(weights: dict[str, Any], on_singular: object) -> dict[str, Any]:
    target, strength = weights.pop("target", None), weights.pop("target_strength", 1.0)
    nearest = weights.get("rounding") == "nearest"
    if nearest:
        weights.pop("damping", None)  # any value was allowed, and meant nothing
    made = _gathered(weights, _GPTQ, "rounder", "nearest")
    more: dict[str, Any] = {}
    if on_singular is not None and not nearest:
        more["on_singular"] = on_singular
    if target == "float_input":
        more["float_target"] = strength
    elif target is not None and target != "own_input":
        more["float_target"] = target  # refused with its name
    if more:
        made["rounder"] = made.get("rounder", {}) | more
    return made


def _gathered(
    part: Mapping[str, Any], names: Mapping[str, str], into: str, without_options: str
) -> dict[str, Any]:
    """Fields of a part as fields of its object `into`, under new names.

    Of the method without options those that say nothing are left out.
    """
    made = {name: value for name, value in part.items() if name not in names}
    inner = {new: part[old] for old, new in names.items() if old in part}
    if inner.get("method") == without_options:
        inner = {n: v for n, v in inner.items() if n not in _IDLE or v != _IDLE[n]}
    return made | ({into: inner} if inner else {})
