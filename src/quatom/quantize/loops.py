"""The inner loops of the rounder by device: Triton kernels on a GPU, torch elsewhere.

Triton is imported on a GPU alone. It is not a dependency of the package, and torch's builds for a
CPU come without it.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from quatom.errors import BackendError
from quatom.numerics.clipping import weight_scales
from quatom.numerics.descent import VisitColumns, visit_columns
from quatom.numerics.formats import Format
from quatom.numerics.rounding import RoundColumns, round_columns


def choose_round_columns(device: torch.device, formats: Sequence[Format]) -> RoundColumns:
    """GPTQ's loop over the columns of a block: the kernel on a GPU for integer formats.

    Raises:
        BackendError: the device is a GPU and Triton is not installed.
    """
    if _runs_kernels(device, formats):
        from quatom.quantize.gptq_triton import round_columns_triton

        return round_columns_triton
    return round_columns


def choose_visit_columns(device: torch.device, formats: Sequence[Format]) -> VisitColumns:
    """A sweep of coordinate descent: the kernel on a GPU for integer formats.

    Raises:
        BackendError: the device is a GPU and Triton is not installed.
    """
    if _runs_kernels(device, formats):
        from quatom.quantize.descent_triton import visit_columns_triton

        return visit_columns_triton
    return visit_columns


def choose_weight_scales(device: torch.device) -> Callable[..., Tensor]:
    """The search of clip ratios: the kernel on a GPU.

    Raises:
        BackendError: the device is a GPU and Triton is not installed.
    """
    if _runs_kernels(device):
        from quatom.quantize.clip_search_triton import weight_scales_triton

        return weight_scales_triton
    return weight_scales


def _runs_kernels(device: torch.device, formats: Sequence[Format] = ()) -> bool:
    """Whether the device is a GPU, and the formats are the integers that its kernels round to."""
    if device.type != "cuda":
        return False
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise BackendError(
            "quantizing on a GPU needs Triton, which is not installed: pip install 'quatom[gpu]', "
            "or --device cpu"
        ) from error
    return all(fmt.is_integer for fmt in formats)
