"""`quatom import`: a checkpoint of another quantizer in, a Quatom checkpoint out."""

from pathlib import Path
from typing import Annotated

import typer


def import_checkpoint(
    source: Annotated[
        str,
        typer.Argument(
            help="Folder or hub id of a W4A16 or W8A8 checkpoint of GPTQ, AWQ or llm-compressor."
        ),
    ],
    target: Annotated[Path, typer.Argument(help="Folder to write; must not exist yet.")],
    resume: Annotated[
        bool, typer.Option(help="Continue an interrupted run of the same command.")
    ] = False,
) -> None:
    """Write a Quatom checkpoint with the same codes and scales as another tool's."""
    from quatom.cli.common import print_table, rung_progress
    from quatom.quantize.importing import import_checkpoint

    with rung_progress(f"Importing {source}") as on_block:
        report = import_checkpoint(source, target, resume=resume, on_block=on_block)
    print_table(
        f"Wrote {report.target}",
        ("recipe", "bits per weight", "size (MB)"),
        [
            (
                report.recipe.name,
                f"{report.bits_per_weight:.3f}",
                f"{report.checkpoint_bytes / 1e6:.1f}",
            )
        ],
    )
