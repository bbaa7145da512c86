"""Which implementation of an operation runs, chosen by device and never silently replaced."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum

import torch

from quatom.errors import BackendError


class Backend(StrEnum):
    """An implementation of an operation."""

    REFERENCE = "reference"
    """Plain torch on any device: the specification."""
    CPU = "cpu"
    """torch's int8 matrix product, for linear layers on a CPU."""
    TRITON = "triton"
    """Triton: CUDA from sm_80 on, or the CPU under TRITON_INTERPRET=1."""
    CUBLAS = "cublas"
    """NVIDIA's matrix products through torch, where a scheme is one such product."""
    CUDA = "cuda"
    """CUDA C++ compiled at first use; which architectures, each operation says."""


_observed: dict[str, Backend] | None = None


@contextmanager
def observe_choices() -> Iterator[dict[str, Backend]]:
    """Collect which backend each operation runs on, by its name, while the context is open."""
    global _observed
    found: dict[str, Backend] = {}
    before, _observed = _observed, found
    try:
        yield found
    finally:
        _observed = before


def note_choice(op: str, backend: Backend) -> Backend:
    """The backend, told to `observe_choices`."""
    if _observed is not None:
        _observed[op] = backend
    return backend


def choose_backend(
    op: str, available: Sequence[Backend], device: torch.device, asked: Backend | None = None
) -> Backend:
    """The backend that `op` runs on `device`.

    `asked` wins, then the environment variable QUATOM_BACKEND, then the last of `available`
    (ordered from portable to fast) on a CUDA device and the reference elsewhere.

    Raises:
        BackendError: the backend asked for does not exist for this operation.
    """
    name = asked or os.environ.get("QUATOM_BACKEND")
    if name:
        if name not in list(available):
            raise BackendError(
                f"{op} has no backend {str(name)!r}; it has {', '.join(available)}: change the "
                "backend argument or QUATOM_BACKEND"
            )
        return note_choice(op, Backend(name))
    return note_choice(op, available[-1] if device.type == "cuda" else Backend.REFERENCE)
