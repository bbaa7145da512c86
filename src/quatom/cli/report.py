"""`quatom report`: result files in, one self-contained HTML page out."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    results: Annotated[
        list[Path],
        typer.Argument(
            help="Result files or folders of them, checkpoints, JSON files of quatom inspect, and "
            "pictures to show as figures."
        ),
    ],
    html: Annotated[Path, typer.Option(help="Page to write.")],
    gpu: Annotated[
        list[str] | None,
        typer.Option(
            help="GPU on which to compute memory and the limit of throughput of the checkpoints, "
            "such as H200; may be repeated."
        ),
    ] = None,
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "Quatom results",
) -> None:
    """Show measurements as one HTML page that needs no network."""
    from quatom.evaluation.report import write_report

    write_report(results, html, title, gpu or ())
    typer.echo(f"wrote {html}")
