"""Recipes in JSON files, which may start from a preset, and how two recipes differ."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quatom.errors import RecipeError
from quatom.presets import PRESETS
from quatom.recipe import Recipe

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
        raise RecipeError(
            f"unknown recipe {name!r}; presets are {', '.join(PRESETS)}; or give a .json file"
        )
    try:
        return recipe_from(json.loads(Path(name).read_text(encoding="utf-8")))
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
    own = dict(data)
    name = own.pop("base")
    if not isinstance(name, str) or name not in PRESETS:
        raise RecipeError(f"unknown base {name!r}; presets are {', '.join(PRESETS)}")
    base = PRESETS[name]
    return Recipe.from_dict(_over(base.to_dict(), {"name": CUSTOM, **own})), base


def _over(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `own`, field by field where both are objects."""
    merged = dict(base)
    for key, value in own.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _over(base[key], value) if both else value
    return merged


def differences(recipe: Recipe, base: Recipe) -> dict[str, tuple[Any, Any]]:
    """Every field in which two recipes differ, by its full name: (value of base, of recipe)."""
    values, before = _flat(recipe.to_dict()), _flat(base.to_dict())
    return {
        name: (before[name], value)
        for name, value in values.items()
        if name != "name" and before[name] != value
    }


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
