"""`quatom export`: a checkpoint in the format of another tool."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def export(
    checkpoint: Annotated[str, typer.Argument(help="Quatom checkpoint.")],
    target: Annotated[Path, typer.Argument(help="Folder to write; must not exist yet.")],
    format: Annotated[
        Literal["compressed-tensors"], typer.Option(help="Format to write.")
    ] = "compressed-tensors",
) -> None:
    """Write a checkpoint in another format, for recipes that the format can say."""
    from quatom.checkpoint.compressed_tensors import export_compressed_tensors

    typer.echo(f"Wrote {export_compressed_tensors(checkpoint, target)} ({format})")
