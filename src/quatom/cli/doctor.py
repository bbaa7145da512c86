"""`quatom doctor`: what this machine has and which kernels run, or what of a model is read."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quatom.cli.options import DeviceOption
from quatom.presets import DEFAULT_RECIPE

if TYPE_CHECKING:
    from collections.abc import Sequence


def doctor(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Hugging Face folder, hub id, GGUF or checkpoint. Default: look at the machine."
        ),
    ] = None,
    recipe: Annotated[
        str, typer.Option(help="Recipe whose kernels are shown, without MODEL.")
    ] = DEFAULT_RECIPE,
    device: DeviceOption = None,
    json: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Say what was found on this machine, or which files and keys of a model are read."""
    from dataclasses import asdict

    from quatom.cli.common import check_output

    check_output(json)
    findings = _machine(recipe, device) if model is None else _model(model)
    if json is not None:
        from json import dumps

        content = dumps([asdict(finding) for finding in findings], indent=1)
        json.write_text(content + "\n", encoding="utf-8")


def _model(model: str) -> "Sequence[Any]":
    from quatom.checkpoint.diagnosis import as_rows, diagnose
    from quatom.checkpoint.reader import open_source
    from quatom.cli.common import print_table

    source = open_source(model)
    findings = diagnose(source)
    header = ("file", "read", "skipped")
    print_table(str(source.folder), header, as_rows(findings, source.folder), text=True)
    return findings


def _machine(recipe: str, device: str | None) -> "Sequence[Any]":
    from quatom.benchmark.machine import find_kernels, find_software
    from quatom.cli.common import print_table, read_recipe
    from quatom.placement import usable_device

    chosen, place = read_recipe(recipe), usable_device(device)
    software = find_software()
    rows = [(f.what, f.found, f.remedy) for f in software]
    print_table("This machine", ("what", "found", "to do"), rows, text=True)
    kernels = find_kernels(chosen, place)
    rows = [(f.what, f.found, f.remedy) for f in kernels]
    header = ("operation", "runs on", "why")
    print_table(f"Kernels of {chosen.name} on {place}", header, rows, text=True)
    return [*software, *kernels]
