"""Files that are not what their names say, as a download that failed or stopped leaves them.

A link whose target is missing counts as present: passing it over would believe another file.
"""

import os
from pathlib import Path

from quatom.errors import CheckpointError

_HEAD_BYTES = 256
_POINTER = b"version https://git-lfs.github.com/spec/"
_PAGES = (b"<!doctype html", b"<html")
_MARKS = {
    b"\xef\xbb\xbf": "begins with a byte order mark; save it as UTF-8 without one",
    b"\xff\xfe": "is UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "is UTF-16 text; save it as UTF-8",
}


def is_present(file: Path) -> bool:
    """Whether there is anything of this name, a broken link among it."""
    return os.path.lexists(file)


def exists(path: Path) -> bool:
    """Whether a path leads to something; a name that no file can have does not."""
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or with a NUL
        return False


def check_contents(file: Path, *, text: bool) -> None:
    """Raise CheckpointError if a file is for sure something else than a file of a model.

    Args:
        file: may be missing: whoever reads it says so.
        text: the file holds UTF-8 text, which must not begin with a byte order mark.
    """
    if (what := _what_else(file, text)) is not None:
        raise CheckpointError(f"{file} {what}")


def _what_else(file: Path, text: bool) -> str | None:
    if not is_present(file):
        return None
    if not exists(file):
        return f"is a link to {os.readlink(file)}, which is not there; download it again"
    if file.is_dir():
        return "is a folder, and a file of that name is needed"
    if not file.is_file():
        return "is a pipe, socket or device, and a file of that name is needed"
    try:
        with file.open("rb") as stream:
            head = stream.read(_HEAD_BYTES)
    except OSError:
        return None
    if not head:
        return "is empty; download it again"
    if head.startswith(_POINTER):
        return "is a pointer of Git LFS, not the file itself; run git lfs pull"
    if head.lstrip().lower().startswith(_PAGES):
        return "is a web page, not the file itself; download it again"
    marks = _MARKS.items() if text else ()
    return next((reason for mark, reason in marks if head.startswith(mark)), None)
