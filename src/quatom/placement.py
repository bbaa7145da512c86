"""Where a model runs and in which number format it computes: what users may ask for, checked."""

import torch

from quatom.arguments import shown
from quatom.checkpoint.reader import TensorSource
from quatom.errors import BackendError
from quatom.ops.backend import Backend

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""Number formats that models compute in, by name."""


def usable_device(device: str | torch.device | None = None) -> torch.device:
    """The device, checked; None: the GPU if torch sees one, else the CPU.

    Raises:
        BackendError: it is neither the CPU nor a GPU that torch sees.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if not isinstance(device, str | torch.device):
            raise TypeError  # torch takes a number for a GPU's
        place = torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise BackendError(f"unknown device {shown(device)}: use cpu or cuda") from error
    if place.type not in ("cpu", "cuda"):
        raise BackendError(f"device {device!r} is not supported: use cpu or cuda")
    if place.type == "cpu":
        if place.index:
            raise BackendError(f"device {place} was asked for but there is one CPU: use cpu")
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise BackendError("device 'cuda' was asked for but torch sees no GPU: use cpu")
    count = torch.cuda.device_count()
    if place.index is not None and place.index >= count:
        raise BackendError(f"device {device!r} was asked for but torch sees {count} GPU(s)")
    return place


def usable_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The number format, checked; a name stands for torch's dtype; None stays None.

    Raises:
        BackendError: models do not compute in it.
    """
    if dtype is None:
        return None
    found: object = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or found not in DTYPES.values():
        raise BackendError(f"dtype must be one of {', '.join(DTYPES)}, got {shown(dtype)}")
    return found


def usable_backend(backend: str | Backend | None) -> Backend | None:
    """The implementation of operations, checked; None stays None: each operation picks by device.

    Raises:
        BackendError: there is no such one.
    """
    if backend is None:
        return None
    if not isinstance(backend, str) or backend not in list(Backend):
        raise BackendError(f"backend must be one of {', '.join(Backend)}, got {shown(backend)}")
    return Backend(backend)


def default_dtype(source: TensorSource, device: torch.device) -> torch.dtype:
    """float32 on a CPU; on a GPU the dtype of the source's weights, bfloat16 for float32 ones."""
    if device.type == "cpu":
        return torch.float32
    dtype = source.dtype(source.model_config.embedding_name)
    return torch.bfloat16 if dtype == torch.float32 else dtype
