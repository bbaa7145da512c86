"""Options that several commands share."""

from typing import Annotated

import typer

MOST_GIB = 1e6
"""Bound of options in GiB, which infinity is above."""
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu or cuda. Default: the GPU if there is one, else the CPU.")
]
