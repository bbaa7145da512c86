"""Parts of the docs that are generated from the code: recipes, options, the package map."""

import ast
import inspect
import textwrap
from dataclasses import MISSING, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import typer.cli
import typer.main
from result_files import GPUS, exists, machines, read
from typer.core import TyperGroup

import quatom
from quatom.argument_kinds import parts_of
from quatom.benchmark.memory_plan import GIB, find_gpu, plan_memory
from quatom.benchmark.model_shapes import find_shape
from quatom.cli.main import app
from quatom.presets import DEFAULT_RECIPE, PRESETS
from quatom.recipe import Recipe
from quatom.recipe_fields import dataclasses_in, is_optional, items_of, tags_of

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
    return "\n".join(_fields(Recipe, "", "`recipe`"))


def _fields(spec: Any, prefix: str, title: str) -> list[str]:
    """The table of an object, and those of the objects in it."""
    hints, docs = get_type_hints(spec), _attribute_docs(spec)
    rows, inner = [], []
    for item in fields(spec):
        hint, name = hints[item.name], f"{prefix}{item.name}"
        doc = docs.get(item.name, "")
        if not (nested := dataclasses_in(hint)):
            rows.append([f"`{name}`", _values(hint), _default(item.default), doc])
            continue
        for part in nested:
            heading = f"`{name}`" if len(nested) == 1 else f"`{name}`, method `{tags_of(part)[0]}`"
            inner += _fields(part, f"{name}.", heading)
        if len(nested) > 1:
            methods = ", ".join(f"method `{tags_of(part)[0]}`" for part in nested)
            default = f"method `{tags_of(nested[0])[0]}`"
            if is_optional(hint):
                methods, default = f"{methods}, `null`", "`null`"
            rows.append([f"`{name}`", methods, default, doc])
        elif is_optional(hint):
            rows.append([f"`{name}`", "an object, `null`", "`null`", doc])
        elif items_of(hint) is not None:
            rows.append([f"`{name}`", "a list of objects", _default(item.default), doc])
    lead = f"## {title}\n\n{inspect.getdoc(spec)}\n\n"
    return [lead + table(["field", "values", "default", "meaning"], rows), *inner]


def _values(hint: Any) -> str:
    """The values that an annotation allows."""
    if (item := items_of(hint)) is not None:
        return f"a list of {_values(item)}"
    choices: list[str] = []
    for part in parts_of(hint):
        choices += get_args(part) if get_origin(part) is Literal else [part.__name__]
    return ", ".join(f"`{'null' if choice == 'NoneType' else choice}`" for choice in choices)


def _default(value: object) -> str:
    if value is MISSING:
        return ""
    return f"`{ {None: 'null', (): '[]'}.get(value, value) }`"  # type: ignore[arg-type, call-overload]


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


FIT_MODELS = ("llama-2-7b", "llama-3-8b", "llama-2-13b", "llama-2-70b")
FIT_GPUS = ("H200", "H100", "A100-80GB", "L40S", "RTX4090")


def fit(name: str) -> str:
    """What `quatom plan` computes for models of 7B to 70B, and where quantizing was timed."""
    times: dict[str, str] = {}
    for where in GPUS:
        if exists(f"quantize-{where}"):
            data = read(f"quantize-{where}")
            for e in data["results"]:
                how = f"`{e['recipe']}`, {machines(data, [e])}"
                times.setdefault(e["model"], f"{e['seconds']:.0f} s ({how})")
    rows, gpus = [], [find_gpu(gpu) for gpu in FIT_GPUS]
    for model in FIT_MODELS:
        config = find_shape(model)
        for recipe in ("fp16", DEFAULT_RECIPE):
            plans = [plan_memory(config, PRESETS[recipe], gpu.memory_gib) for gpu in gpus]
            sequences = [f"{p.sequences(4096):,}" if p.fits else "does not fit" for p in plans]
            first = plans[0]
            time = "" if recipe == "fp16" else times.get(f"random:{model}", "not measured")
            rows.append(
                [
                    f"{model}, `{recipe}`",
                    f"{first.weight_bytes / GIB:.1f}",
                    f"{first.kv_bytes_per_token / 1024:.0f}",
                    *sequences,
                    time,
                ]
            )
    shown = [
        name if gpu.tested else f"{name} (not tested)"
        for name, gpu in zip(FIT_GPUS, gpus, strict=True)
    ]
    header = ["model, recipe", "weights (GiB)", "KV (KiB per token)", *shown, "time to quantize"]
    return table(header, rows)


CODE_TABLES = {
    "fit": fit,
    "commands": commands,
    "fields": fields_of_recipes,
    "package": package,
    "presets": presets,
}
