"""Every exception that Quatom raises on purpose.

A message says what is wrong, with the numbers, and what to do. Each class is also a builtin
exception, so that callers who know nothing of Quatom still catch it.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class QuatomError(Exception):
    """Base of all errors that Quatom raises on purpose; the command line prints it on one line."""


class ArgumentError(QuatomError, ValueError):
    """An argument is of another kind than the function says: a number where a path is meant."""


class ShapeError(QuatomError, ValueError):
    """Tensor shapes, dtypes or sizes do not fit each other."""


class RecipeError(QuatomError, ValueError):
    """A recipe is inconsistent, unknown, newer than this library, or does not fit a model."""


class ModelError(QuatomError, ValueError):
    """A model's architecture or configuration is not supported."""


class CheckpointError(QuatomError, RuntimeError):
    """A checkpoint folder is missing, damaged, incomplete or cannot be written."""


class CalibrationError(QuatomError, ValueError):
    """Calibration or evaluation text is unusable."""


class QuantizationError(QuatomError, RuntimeError):
    """A layer cannot be quantized as the recipe asks."""


class BackendError(QuatomError, RuntimeError):
    """A kernel backend cannot run what was asked, or no backend exists for a device."""


class RequestError(QuatomError, ValueError):
    """A generation request is invalid: sampling parameters, prompt or lengths."""


class EngineError(QuatomError, RuntimeError):
    """The engine cannot continue: out of blocks for a single request, or a failed step."""


class QueueFullError(EngineError):
    """Too many requests wait already; try again later."""


class ServerError(QuatomError, RuntimeError):
    """A server cannot start: its address, certificate, keys or options are unusable."""


class OtherProcessError(QuatomError, RuntimeError):
    """Another process of a common work failed, and says why; this one stops, too."""


def unknown(kind: str, name: object, known: Iterable[str]) -> str:
    """The beginning of a message about a name that is none of `known`: the nearest one, and all."""
    names, typed = {one.lower(): one for one in known}, str(name).lower()
    near = [typed] if typed in names else [one for one in names if typed in one][:2]
    near = near or get_close_matches(typed, names, n=1)
    meant = " or ".join(repr(names[one]) for one in near)
    hint = f" (did you mean {meant}?)" if near else ""
    return f"unknown {kind} {name!r}{hint}; known are {', '.join(names.values())}"
