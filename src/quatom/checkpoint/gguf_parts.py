"""GGUF files by name: which of them are one model, split into parts."""

import re
from collections.abc import Iterable
from pathlib import Path

_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.gguf)", re.IGNORECASE)


def split_parts(path: Path) -> list[Path]:
    """All parts of the model that a file belongs to, present or not, in order."""
    match = _PART.fullmatch(path.name)
    if match is None:
        return [path]
    name, _, count, suffix = match.groups()
    return [path.with_name(f"{name}-{i + 1:05d}-of-{count}{suffix}") for i in range(int(count))]


def models(files: Iterable[Path]) -> list[Path]:
    """The models among some files, each as its first part, present or not.

    Projectors of images (mmproj) are none, and neither are files of other kinds.
    """
    gguf = (f for f in files if f.suffix.lower() == ".gguf" and not f.name.startswith("mmproj"))
    return sorted({split_parts(file)[0] for file in gguf})
