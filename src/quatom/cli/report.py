"""`quatom report`: result files in, one self-contained HTML page out."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    results: Annotated[
        list[Path],
        typer.Argument(
            help="Result files or folders of them, checkpoints, and pictures to show as figures."
        ),
    ],
    html: Annotated[Path, typer.Option(help="Page to write.")],
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "Quatom results",
) -> None:
    """Show measurements as one HTML page that needs no network."""
    from quatom.evaluation.report import write_report

    write_report(results, html, title)
    typer.echo(f"wrote {html}")
