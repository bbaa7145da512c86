"""Text that people bring: plain files and JSON lines. Nothing else is read as if it were text."""

import gzip
import json
from pathlib import Path
from typing import Any

from quatom.errors import CalibrationError

_ROWS = tuple(
    f".{kind}{packed}" for kind in ("jsonl", "jsonlines", "ndjson") for packed in ("", ".gz")
)
_LONGEST_NAME = 255  # of Linux file systems
# Files of data, not of text: their syntax would be measured on.
_STRUCTURED = """
    .7z .arrow .avro .bin .bz2 .csv .db .docx .feather .gguf .gz .h5 .htm .html .ipynb .json .lz4
    .npy .npz .odt .orc .parquet .pdf .pickle .pkl .pt .pth .rar .rtf .safetensors .sqlite .svg .tar
    .tsv .xml .xz .yaml .yml .zip .zst
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
    if (kind := _json_kind(text)) is not None:
        raise CalibrationError(f"{path} holds {kind}, no plain text: its syntax would be read too")
    return text


def _json_kind(text: str) -> str | None:
    """What a text is, with the remedy, if it is JSON whatever its name says."""
    text = text.lstrip()
    if not text.startswith(("{", "[")):
        return None
    try:
        if isinstance(json.loads(text.partition("\n")[0]), dict):
            return "JSON lines (name it .jsonl)"
    except (ValueError, RecursionError):
        pass  # one value over several lines, or no JSON
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return None
    return "JSON (make it .jsonl, an object with a 'text' in each line)"


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


def text_of(row: dict[str, Any], origin: str, kinds: str = "a 'text'") -> str:
    """The `text` of a row; `kinds` says in an error what rows may have.

    Raises:
        CalibrationError: it has none.
    """
    text = row.get("text")
    if not isinstance(text, str):
        has = ", ".join(sorted(key for key, value in row.items() if value is not None))
        what = f"a 'text' of type {type(text).__name__}" if text is not None else has or "nothing"
        raise CalibrationError(f"{origin}: every row must have {kinds}, one has {what}")
    check_characters(text, origin)
    return text


def check_characters(text: str, origin: str) -> None:
    """Raise CalibrationError if a text holds what no tokenizer reads: half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CalibrationError(
            f"{origin}: a text holds {text[error.start]!a}, half of a surrogate pair, at "
            f"character {error.start}; remove it"
        ) from None


def _read_bytes(path: Path) -> bytes:
    if len(path.name) > _LONGEST_NAME or "\0" in path.name:
        raise CalibrationError(
            f"{str(path)[:40]!r}... is no name of a file: give the name of a text file, not the "
            "text itself"
        )
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise CalibrationError(f"{path}: no such text file") from None
    except IsADirectoryError:
        raise CalibrationError(f"{path} is a folder; give a plain-text file") from None
    except OSError as error:
        raise CalibrationError(f"cannot read {path!s:.200}: {error.strerror}") from None
