"""Entries of serving-GPU.json, and adding them to a file without losing what is there."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quatom.benchmark.environment import command_line, describe_environment, write_results
from quatom.errors import EngineError

_IDENTITY = (
    "mode",
    "model",
    "recipe",
    "gpu_memory_gb",
    "workload",
    "requests",
    "request_rate",
    "concurrency",
    "comparison",
    "engine",
    "tensor_parallel",
)
"""What makes two entries the same measurement: the newer one replaces the older."""
_NULLS = dict.fromkeys(
    (
        "request_rate",
        "concurrency",
        "comparison",
        "batch",
        "total_tokens_per_s",
        "ttft_ms",
        "tpot_ms",
        "itl_ms",
        "e2e_ms",
        "max_running",
        "kv_tokens",
        "share_of_limit",
    )
)


def make_entry(
    *, mode: str, model: str, recipe: str, gpu_memory_gb: float | None, **measured: Any
) -> dict[str, Any]:
    """An entry with every key, null where a mode has nothing to say."""
    first = {"mode": mode, "model": model, "recipe": recipe, "gpu_memory_gb": gpu_memory_gb}
    return {**first, **_NULLS, **measured}


def identity(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    """What an entry measures. The batch that just fits is whatever fits: not part of it."""
    batch = None if entry.get("comparison") == "equal memory" else entry.get("batch")
    return (*(entry.get(key) for key in _IDENTITY), batch)


def read_entries(path: Path) -> list[dict[str, Any]]:
    """Entries of a result file; none where there is no file yet.

    Called before a measurement too: minutes of a GPU must not end at a file that is something else.

    Raises:
        EngineError: the file is there but is no result file.
    """
    if not path.exists():
        return []
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))["results"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EngineError(
            f"{path} exists and is no result file ({error!r}): give another --json"
        ) from error


def add_entries(
    path: Path,
    entries: list[dict[str, Any]],
    ceilings: Mapping[str, float] | None,
    program: Sequence[str] = (),
) -> None:
    """Write entries to a result file, keeping those it has of other measurements.

    Args:
        path: the file, which need not exist.
        entries: as `make_entry` makes them.
        ceilings: measured limits of the GPU, for the file's environment.
        program: how this process was called; none: quatom.

    Raises:
        EngineError: as `read_entries` says.
    """
    new = {identity(entry) for entry in entries}
    merged = [entry for entry in read_entries(path) if identity(entry) not in new]
    environment = describe_environment() | dict(ceilings or {})
    command = command_line(*program)
    origin = {"command": command, "commit": environment["commit"], "date": environment["date"]}
    merged += [entry | origin for entry in entries]
    write_results(path, command, environment, merged)


def summary(entry: Mapping[str, Any]) -> str:
    """One line for the terminal."""
    share = entry["share_of_limit"]
    parts = [
        f"{entry['model']} {entry['recipe']}",
        "" if entry["gpu_memory_gb"] is None else f"{entry['gpu_memory_gb']:g} GiB",
        entry["workload"],
        "" if entry["batch"] is None else f"batch {entry['batch']}",
        f"{entry['output_tokens_per_s']:.0f} output tokens/s",
        *(
            f"{name} {entry[f'{name}_ms']['p50']:.1f}/{entry[f'{name}_ms']['p99']:.1f} ms"
            for name in ("ttft", "tpot", "itl", "e2e")
            if entry[f"{name}_ms"]
        ),
        "" if share is None else f"{share:.1%} of the limit",
    ]
    return "  ".join(part for part in parts if part)
