"""`quatom recipes`: the presets, or every field of one recipe."""

from typing import Annotated

import typer


def recipes(
    name: Annotated[
        str | None, typer.Argument(help="Preset, or a JSON file with a recipe. Default: list all.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print every field as JSON.")] = False,
) -> None:
    """List the recipes, or show what one recipe changes."""
    from json import dumps

    from quatom.cli.common import print_recipe, print_table
    from quatom.presets import DEFAULT_RECIPE, PRESETS
    from quatom.recipe_file import find_recipe

    if name is None:
        if json:
            typer.echo(dumps({key: recipe.to_dict() for key, recipe in PRESETS.items()}, indent=2))
            return
        rows = [
            (r.name, r.weights.format, r.activations.format, r.kv_cache.format)
            for r in PRESETS.values()
        ]
        title = f"Recipes; the default is {DEFAULT_RECIPE}; quatom recipes NAME shows one"
        print_table(title, ("name", "weights", "activations", "KV cache"), rows, text=True)
        return
    recipe, base = find_recipe(name)
    if json:
        typer.echo(dumps(recipe.to_dict(), indent=2))
    else:
        print_recipe(recipe, base)
