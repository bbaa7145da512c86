"""Another Python process that imports what this one would."""

import os
import subprocess
import sys
from typing import Any


def start_module(
    module: str, *arguments: str, flags: tuple[str, ...] = (), **options: Any
) -> "subprocess.Popen[bytes]":
    """Start `python -m MODULE ARGUMENTS`; no file of the current folder takes a module's place.

    Args:
        module: its full name.
        arguments: of its command line.
        flags: of Python itself.
        options: of subprocess.Popen.
    """
    return subprocess.Popen(
        [sys.executable, "-P", *flags, "-m", module, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        **options,
    )
