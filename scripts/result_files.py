"""Result files of benchmarks/results, and what every table made of them needs."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
GPUS = ("h200", "h100")
"""GPUs of result files, the one that README and docs show first in front."""
NOT_MEASURED = "Not measured yet.\n"
RECIPE_ORDER = (
    "fp16",
    "w8a8",
    "smoothquant-w8a8",
    "w4a16",
    "gptq-w4a16",
    "awq-w4a16",
    "omniquant-w4a16",
    "quip-w4a16",
    "rtn-w4a4",
    "smoothquant-w4a4",
    "omniquant-w4a4kv4",
    "qllm-w4a4kv4",
    "atom-w4a4kv4",
    "quatom-w4a4kv4",
    "quatom-w4a4kv4-tuned",
    "atom-w4a8kv4",
    "quatom-w4a8kv4",
    "quatom-w4a8kv4-tuned",
    "atom-fp4",
    "atom-w3a3",
)


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; columns of numbers, but for the first one, align to the right."""
    columns = list(zip(*rows, strict=True))[1:] or [()] * (len(header) - 1)
    rules = ["|---:" if _numbers(column) else "|---" for column in columns]
    lines = ["| " + " | ".join(header) + " |", "".join(["|---", *rules, "|"])]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _numbers(cells: tuple[str, ...]) -> bool:
    """Whether a column has numbers: at least half of what it says begins as one."""
    said = [cell for cell in cells if cell]
    begins = [cell.lstrip("*+-").startswith(tuple("0123456789")) for cell in said]
    return 2 * sum(begins) >= len(said)


def exists(name: str) -> bool:
    """Whether a result file is there."""
    return (RESULTS / f"{name}.json").exists()


def matching(pattern: str) -> list[str]:
    """Names of the result files that a pattern with * fits, in order."""
    return sorted(path.stem for path in RESULTS.glob(f"{pattern}.json"))


def read(name: str) -> dict[str, Any]:
    """A result file by its name without .json."""
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return content


def picture_file(name: str) -> Path:
    """A picture beside the result files."""
    return RESULTS / f"{name}.png"


def machine(data: dict[str, Any]) -> str:
    """The GPU of a result file, or its CPU where it has none."""
    environment = data["environment"]
    return str(environment.get("gpu") or environment["cpu"])


def machines(data: dict[str, Any], entries: list[dict[str, Any]]) -> str:
    """The machines that some entries of a file were measured on."""
    return ", ".join(dict.fromkeys(e.get("machine", machine(data)) for e in entries))


def origin(data: dict[str, Any], entries: Iterable[dict[str, Any]]) -> str:
    """Machine, version of torch, and the commits that some entries of a file were measured at.

    A kind of file without a commit in its entries was written by one command: that of its
    environment counts.
    """
    environment = data["environment"]
    entries = list(entries)
    commits = list(dict.fromkeys(e.get("commit", environment["commit"]) for e in entries))
    days = sorted({e.get("date", environment["date"]) for e in entries})
    span = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    word = "commit" if len(commits) == 1 else "commits"
    return f"{machine(data)}, torch {environment['torch']}, {word} {', '.join(commits)} ({span})"


def label(recipe: str) -> str:
    """A recipe as tables name it."""
    return "float" if recipe == "fp16" else f"`{recipe}`"


def rank(recipe: str) -> tuple[int, str]:
    """Position of a recipe among the rows of a table."""
    known = RECIPE_ORDER.index(recipe) if recipe in RECIPE_ORDER else len(RECIPE_ORDER)
    return known, recipe
