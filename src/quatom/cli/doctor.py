"""`quatom doctor`: which files and keys of a model are believed, and which are passed over."""

from pathlib import Path
from typing import Annotated

import typer


def doctor(
    model: Annotated[str, typer.Argument(help="Hugging Face folder, hub id, GGUF or checkpoint.")],
    json: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Say which files and keys of a model are read, and what is passed over."""
    from dataclasses import asdict

    from quatom.checkpoint.diagnosis import as_rows, diagnose
    from quatom.checkpoint.reader import open_source
    from quatom.cli.common import print_table

    source = open_source(model)
    findings = diagnose(source)
    print_table(
        str(source.folder),
        ("file", "believed", "passed over"),
        as_rows(findings, source.folder),
        text=True,
    )
    if json is not None:
        from json import dumps

        content = dumps([asdict(finding) for finding in findings], indent=1)
        json.write_text(content + "\n", encoding="utf-8")
