"""Options that several commands share."""

from typing import Annotated

import typer

DeviceOption = Annotated[
    str | None, typer.Option(help="cpu or cuda. Default: the GPU if there is one, else the CPU.")
]
