"""Recipes in JSON files, which may start from a preset, and how two recipes differ."""

from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from quatom.errors import RecipeError, unknown
from quatom.json_text import parse_json
from quatom.presets import PRESETS
from quatom.recipe import Recipe
from quatom.recipe_fields import TAG
from quatom.recipe_versions import to_current

CUSTOM = "custom"
"""Name of a recipe file that gives none."""


def find_recipe(name: str) -> tuple[Recipe, Recipe]:
    """A preset by its name or a recipe by its .json file, and the recipe that it starts from.

    Returns:
        The recipe, and its base: the preset named in `base`, else the defaults of all fields.

    Raises:
        RecipeError: there is no such preset or file, or the file is not a recipe.
    """
    if name in PRESETS:
        return PRESETS[name], Recipe()
    if not name.endswith(".json"):
        raise RecipeError(f"{unknown('recipe', name, PRESETS)}; or give a .json file")
    try:
        return recipe_from(parse_json(Path(name).read_text(encoding="utf-8")))
    except OSError as error:
        raise RecipeError(f"cannot read recipe {name}: {error.strerror}") from error
    except ValueError as error:  # RecipeError is one, too
        raise RecipeError(f"{name} is not a recipe: {error}") from error


def recipe_from(data: Any) -> tuple[Recipe, Recipe]:
    """A recipe of plain JSON types, and its base.

    `"base": NAME` names the preset whose values the fields have that are left out.

    Raises:
        RecipeError: the base is unknown, or a field is.
    """
    if not isinstance(data, dict) or "base" not in data:
        return Recipe.from_dict(data), Recipe()
    own = to_current(data)
    name = own.pop("base")
    if not isinstance(name, str) or name not in PRESETS:
        raise RecipeError(unknown("base", name, PRESETS))
    base = PRESETS[name]
    return changed(base, {"name": CUSTOM, **own}), base


def changed(base: Recipe, own: Mapping[str, Any]) -> Recipe:
    """A recipe with the fields in `own`, plain JSON types nested as in a file, in place of its own.

    Raises:
        RecipeError: a field is unknown, or its value not allowed.
    """
    return Recipe.from_dict(_over(base.to_dict(), own))


def _over(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `own`, field by field where both are objects of one method."""
    merged = dict(base)
    for key, value in own.items():
        merged[key] = _over(base[key], value) if _alike(base.get(key), value) else value
    return merged


def _alike(base: Any, own: Any) -> bool:
    both = isinstance(base, dict) and isinstance(own, dict)
    return both and own.get(TAG, base.get(TAG)) == base.get(TAG)


def differences(recipe: Recipe, base: Recipe) -> dict[str, tuple[Any, Any]]:
    """Every field in which two recipes differ, by its full name: (value of base, of recipe).

    Fields of another method than the base's have None as its value.
    """
    return _differences(recipe.to_dict() | {"name": base.name}, base.to_dict(), "")


def _differences(
    own: Mapping[str, Any], base: Mapping[str, Any], prefix: str
) -> dict[str, tuple[Any, Any]]:
    found: dict[str, tuple[Any, Any]] = {}
    for key, value in own.items():
        before: Any = base.get(key)
        if isinstance(value, dict):
            inner = before if _alike(before, value) else {TAG: _tag(before)}
            found |= _differences(value, inner, f"{prefix}{key}.")
        elif isinstance(value, list):
            for i, (old, new) in enumerate(zip_longest(before or (), value)):
                if old != new:
                    found[f"{prefix}{key}[{i}]"] = (old, new)
        elif before != value:
            found[f"{prefix}{key}"] = (_tag(before), value)
    return found


def _tag(value: Any) -> Any:
    """An object by its method alone."""
    return value.get(TAG) if isinstance(value, dict) else value
