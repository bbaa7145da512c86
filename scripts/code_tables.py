"""Parts of the docs that are generated from the code: recipes, options, the package map."""

import ast
import inspect
import textwrap
from dataclasses import MISSING, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import typer.cli
import typer.main
from typer.core import TyperGroup

import quatom
from quatom.cli.main import app
from quatom.presets import PRESETS
from quatom.recipe import Recipe

PACKAGE = Path(quatom.__file__).parent


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table of words."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def presets(name: str) -> str:
    """Every preset with its formats."""
    rows = []
    for preset in PRESETS.values():
        cache, outliers = preset.kv_cache, preset.outliers.channels
        rows.append(
            [
                f"`{preset.name}`",
                preset.weights.format,
                preset.activations.format,
                cache.format,
                f"{outliers} in {preset.outliers.format}" if outliers else "none",
                "yes" if preset.needs_calibration else "no",
            ]
        )
    header = ["recipe", "weights", "activations", "KV cache", "outlier channels", "needs a text"]
    return table(header, rows)


def fields_of_recipes(name: str) -> str:
    """Every field of a recipe: its values, its default and its docstring."""
    parts = [_fields(Recipe, "")]
    hints = get_type_hints(Recipe)
    for part in fields(Recipe):
        if is_dataclass(hints[part.name]):
            parts.append(_fields(hints[part.name], f"{part.name}."))
    return "\n".join(parts)


def _fields(spec: Any, prefix: str) -> str:
    hints, docs = get_type_hints(spec), _attribute_docs(spec)
    rows = []
    for item in fields(spec):
        hint = hints[item.name]
        if is_dataclass(hint):
            continue
        choices = get_args(hint) if get_origin(hint) is Literal else (hint.__name__,)
        default = "" if item.default is MISSING else f"`{item.default}`"
        values = ", ".join(f"`{choice}`" for choice in choices)
        rows.append([f"`{prefix}{item.name}`", values, default, docs.get(item.name, "")])
    title = f"## `{prefix.removesuffix('.') or 'recipe'}`\n\n{inspect.getdoc(spec)}\n\n"
    return title + table(["field", "values", "default", "meaning"], rows)


def _attribute_docs(spec: Any) -> dict[str, str]:
    """The string after each annotated field of a class, on one line."""
    body = ast.parse(textwrap.dedent(inspect.getsource(spec))).body[0].body  # type: ignore[attr-defined]
    found = {}
    for field, after in pairwise(body):
        text = getattr(getattr(after, "value", None), "value", None)
        if isinstance(field, ast.AnnAssign) and isinstance(text, str):
            found[field.target.id] = " ".join(text.split())  # type: ignore[union-attr]
    return found


def commands(name: str) -> str:
    """Every command with its arguments and options, by typer's own generator."""
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    text = typer.cli.get_docs_for_click(
        obj=group, ctx=typer.Context(group), name="quatom", title="The commands", indent=1
    )
    return text.strip() + "\n"


def package(name: str) -> str:
    """Folders and modules of the package with the first line of their docstrings."""
    rows = []
    for path in sorted(PACKAGE.iterdir()):
        if path.name.startswith(("__", ".")) or path.name == "py.typed":
            continue
        source = path / "__init__.py" if path.is_dir() else path
        doc = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
        shown = f"`{path.name}{'/' if path.is_dir() else ''}`"
        rows.append([shown, " ".join(doc.split("\n\n")[0].split())])
    return table(["folder", "what it holds"], rows)


CODE_TABLES = {
    "commands": commands,
    "fields": fields_of_recipes,
    "package": package,
    "presets": presets,
}
