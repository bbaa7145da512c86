"""Entries of accuracy files, and adding them to a file without losing what is there."""

import errno
import fcntl
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from quatom.benchmark.environment import command_line, describe_environment, write_results
from quatom.checkpoint.schema import bits_per_activation, bits_per_kv, bits_per_weight
from quatom.errors import CalibrationError
from quatom.evaluation.perplexity import Perplexity
from quatom.json_text import parse_json
from quatom.loading import LoadedModel
from quatom.quantize.pipeline import QuantizeReport

# What makes two entries the same measurement: the newer one replaces the older.
_IDENTITY = (
    "model",
    "recipe",
    "corpus",
    "sequence_length",
    "windows",
    "backend",
    "device",
    "dtype",
    "task",
    "metric",
    "rung",
    "samples",
)


def accuracy_entry(
    loaded: LoadedModel, model: str, corpus: str, measured: Perplexity
) -> dict[str, Any]:
    """One entry of an accuracy-MODEL.json; `float_perplexity` is filled by `add_results`."""
    recipe = loaded.recipe
    return {
        "model": model,
        "recipe": recipe.name,
        "corpus": corpus,
        "sequence_length": measured.sequence_length,
        "windows": measured.windows,
        "all_windows": measured.all_windows,
        "perplexity": measured.perplexity,
        "float_perplexity": measured.perplexity if recipe.name == "fp16" else None,
        "bits_per_weight": bits_per_weight(loaded.plan, loaded.source_dtype),
        "bits_per_activation": bits_per_activation(loaded.plan),
        "bits_per_kv": bits_per_kv(loaded.plan),
        "backend": loaded.backend_name,
        "device": loaded.device.type,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "seconds": round(measured.seconds, 1),
    } | ({} if measured.divergence is None else asdict(measured.divergence))


def quantize_entry(report: QuantizeReport, model: str, seconds: float) -> dict[str, Any]:
    """One entry of a quantize-MACHINE.json: time, peak memory of this process, size."""
    calibration = report.recipe.calibration
    on_gpu = torch.cuda.is_available()
    return {
        "model": model,
        "recipe": report.recipe.name,
        "samples": calibration.num_samples,
        "sequence_length": calibration.sequence_length,
        "seconds": round(seconds, 1),
        # ru_maxrss is in KiB on Linux.
        "peak_rss_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3),
        "peak_gpu_gb": round(torch.cuda.max_memory_reserved() / 1e9, 3) if on_gpu else 0.0,
        "bits_per_weight": report.bits_per_weight,
        "checkpoint_bytes": report.checkpoint_bytes,
    }


def read_results(path: Path) -> list[dict[str, Any]]:
    """Entries of a result file that may be written; none where there is no file yet.

    Each names the machine that it was measured on, by default that of the file.

    Called before a measurement too: hours of it must not end at a file that cannot be written.

    Raises:
        CalibrationError: the file is there but is no result file, or its folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, "its folder cannot be written")
        content = parse_json(path.read_text(encoding="utf-8"))
        machine = {"machine": _machine(content["environment"])}
        return [machine | entry for entry in content["results"]]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CalibrationError(
            f"cannot write {path}: {error.strerror}; give another --json"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise CalibrationError(
            f"{path} exists and is no result file ({error!r}): give another --json"
        ) from error


def comparable(entries: list[dict[str, Any]], entry: dict[str, Any]) -> list[dict[str, Any]]:
    """Perplexities of other recipes of the same model on the same windows, floating point first."""
    keys = ("model", "corpus", "sequence_length", "windows")
    same = [
        e for e in entries if "perplexity" in e and all(e.get(key) == entry[key] for key in keys)
    ]
    latest = {e["recipe"]: e for e in same if "bits_per_weight" in e}
    return sorted(latest.values(), key=lambda e: bool(e["recipe"] != "fp16"))


def add_results(path: Path, entries: list[dict[str, Any]]) -> None:
    """Write entries to a result file, keeping those it has of other measurements.

    An entry keeps its own command, commit and machine. Processes that add to one file at the same
    time wait for each other.

    Raises:
        CalibrationError: as `read_results` says.
    """
    command, environment = command_line(), describe_environment()
    origin = {
        "command": command,
        "commit": environment["commit"],
        "machine": _machine(environment),
    }
    read_results(path)  # makes the folder, or says why not
    with _locked(path.parent):
        known = read_results(path)
        merged = [entry for entry in known if not any(_replaces(new, entry) for new in entries)]
        merged += [entry | origin for entry in entries]
        _fill_float_perplexity(merged)
        write_results(path, command, environment, merged)


def _machine(environment: dict[str, Any]) -> str:
    """The GPU of an environment, or its CPU where it has none."""
    return str(environment.get("gpu", environment["cpu"]))


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Alone among the processes that ask for this folder; ends with the process at the latest."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _replaces(new: dict[str, Any], old: dict[str, Any]) -> bool:
    """Whether both are the same measurement; old perplexities do not say their device and dtype."""
    keys = (key for key in _IDENTITY if key in old or key not in ("device", "dtype"))
    return all(new.get(key) == old.get(key) for key in keys)


def _fill_float_perplexity(entries: list[dict[str, Any]]) -> None:
    """The perplexity of the float model on the same windows, where it was measured."""

    def windows(entry: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(entry.get(k) for k in ("model", "corpus", "sequence_length", "windows"))

    known = {
        windows(e): e["perplexity"]
        for e in entries
        if e.get("recipe") == "fp16" and "perplexity" in e
    }
    for entry in entries:
        if "float_perplexity" in entry:
            entry["float_perplexity"] = known.get(windows(entry))
