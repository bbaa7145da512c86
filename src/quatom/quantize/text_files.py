"""Text that people bring: plain files and JSON lines. Nothing else is read as if it were text."""

import gzip
import json
from pathlib import Path
from typing import Any

from quatom.errors import CalibrationError

_ROWS = (".jsonl", ".jsonl.gz")
# Files of data, not of text: their syntax would be measured on.
_STRUCTURED = """
    .arrow .bin .bz2 .csv .db .docx .feather .gguf .gz .h5 .html .ipynb .json .npy .npz .parquet
    .pdf .pickle .pkl .pt .pth .safetensors .tar .tsv .xml .xz .yaml .yml .zip .zst
"""


def is_rows(path: Path) -> bool:
    """Whether a file holds a JSON object in each line, by its name."""
    return path.name.lower().endswith(_ROWS)


def read_text(path: str | Path) -> str:
    """The text of a plain-text file.

    Raises:
        CalibrationError: it does not exist, cannot be read, or holds something else than text.
    """
    path = Path(path)
    if path.suffix.lower() in _STRUCTURED.split():
        raise CalibrationError(
            f"{path} is no plain text: give a .txt file, or .jsonl with a 'text' in each line"
        )
    try:
        text = _read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path} is not UTF-8 text (byte {error.start}): convert it, or give another file"
        ) from None
    # Tabs, line ends and form feeds are text; NUL, backspace or escape are not.
    bad = next((c for c in text if c < " " and c not in "\t\n\v\f\r\x1c\x1d\x1e\x1f"), None)
    if bad is not None:
        raise CalibrationError(
            f"{path} is no text: it holds the control character {ord(bad)} at character "
            f"{text.index(bad)}; give a .txt or .jsonl file"
        )
    return text


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, gzipped or not; blank lines are none.

    Raises:
        CalibrationError: it does not exist, cannot be read, or a line is no JSON object.
    """
    raw = _read_bytes(path)
    try:
        text = gzip.decompress(raw) if path.suffix.lower() == ".gz" else raw
    except (OSError, EOFError) as error:
        raise CalibrationError(f"{path} is no gzip file, or truncated: {error}") from None
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(text.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CalibrationError(f"{path}: line {number} is no JSON: {error}") from None
        if not isinstance(row, dict):
            raise CalibrationError(
                f"{path}: line {number} is a {type(row).__name__}, no object with a 'text'"
            )
        rows.append(row)
    return rows


def text_of(row: dict[str, Any], origin: str) -> str:
    """The `text` of a row.

    Raises:
        CalibrationError: it has none.
    """
    text = row.get("text")
    if not isinstance(text, str):
        raise CalibrationError(
            f"{origin}: every row must have a 'text', one has {', '.join(sorted(row)) or 'nothing'}"
        )
    return text


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise CalibrationError(f"{path}: no such text file") from None
    except IsADirectoryError:
        raise CalibrationError(f"{path} is a folder; give a plain-text file") from None
    except OSError as error:
        raise CalibrationError(f"cannot read {path}: {error.strerror}") from None
