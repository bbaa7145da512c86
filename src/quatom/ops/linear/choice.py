"""Which backend multiplies weights of given formats, and why another cannot."""

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from quatom.errors import BackendError, QuantizationError, ShapeError
from quatom.numerics.formats import get_format
from quatom.numerics.groups import GroupLayout, ScaleMode
from quatom.numerics.multiples import split_multiples
from quatom.ops.backend import Backend, choose_backend, note_choice
from quatom.ops.groups_layout import check_fits_groups, holds_int8
from quatom.ops.linear.cpu import cpu_obstacle

_MOST_INT8_PRODUCTS = 2**17 - 1
"""Whose sum int32 holds: each is at most 2**14."""


def choose_linear_backend(
    op: str,
    backends: Sequence[Backend],  # from portable to fast
    values: Tensor,  # (N, K) codes of one matrix
    scales: Tensor,  # (rows, S) of all matrices
    layout: GroupLayout,
    formats: tuple[str, str, str],  # of weights, activations and outliers
    scale_mode: ScaleMode,
    asked: Backend | None,
) -> Backend:
    """The backend that runs these formats.

    Raises:
        BackendError: the one asked for cannot, with the reason.
    """
    weight, activation, outlier = formats
    obstacles = {
        Backend.CUDA: cuda_obstacle(values, scales, layout, formats, scale_mode),
        Backend.CUBLAS: _cublas_obstacle(values, layout, weight, activation),
        Backend.TRITON: _triton_obstacle(layout, weight, outlier),
        Backend.CPU: cpu_obstacle(values, layout, formats if layout.outliers else formats[:2]),
    }
    able = tuple(b for b in backends if not obstacles.get(b))
    if asked is None and "QUATOM_BACKEND" not in os.environ:
        if Backend.CPU in able:  # which means that the weights are on a CPU
            return note_choice(op, Backend.CPU)
        return choose_backend(op, able, values.device)
    chosen = choose_backend(op, backends, values.device, asked)
    if chosen not in able:
        raise BackendError(f"{op} cannot run on backend {chosen}: {obstacles[chosen]}")
    return chosen


def _triton_obstacle(layout: GroupLayout, weight: str, outlier: str) -> str | None:
    if not get_format(weight).integer_bits:
        return f"its weights must be integers, not {weight}; use the reference backend"
    if layout.outliers and outlier != "int8":
        return f"its outliers must be int8, not {outlier}; use the reference backend"
    return None


def _cublas_obstacle(
    values: Tensor, layout: GroupLayout, weight: str, activation: str
) -> str | None:
    if values.device.type != "cuda":
        return f"it needs a CUDA device, the weights are on {values.device}"
    if layout.outliers:
        return f"it multiplies one format, this layout has {layout.outliers} outlier channels"
    if (weight, activation) == ("int8", "int8"):
        if layout.num_scales != 1:
            return f"its INT8 product has one scale per row, this layout has {layout.num_scales}"
        if values.shape[0] % 8 or layout.channels % 8:
            return f"INT8 sizes must be multiples of 8, got {tuple(values.shape)}"
        return None
    if weight in ("int2", "int3", "int4") and activation == "float16":
        return None
    return f"it runs int8 by int8 and int2 to int4 by float16, not {weight} by {activation}"


def cuda_obstacle(
    values: Tensor,
    scales: Tensor,
    layout: GroupLayout,
    formats: tuple[str, str, str],
    scale_mode: ScaleMode,
) -> str | None:
    """Why the Hopper kernel cannot run weights `values` in these formats, or None if it can."""
    weight, activation, outlier = formats
    device, rows = values.device, values.shape[0]
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return f"it needs a Hopper GPU (sm_90), the weights are on {device}"
    if rows % 4:
        return f"it stores four output channels at a time, there are {rows}: pad the weights"
    if weight not in ("int2", "int3", "int4"):
        return f"its weights must be int2 to int4, not {weight}"
    try:
        check_fits_groups(layout, activation, outlier, scale_mode)
        if holds_int8(activation, scale_mode):
            if layout.normal > _MOST_INT8_PRODUCTS:
                return (
                    f"{layout.normal} products of INT8 numbers overflow int32, "
                    f"{_MOST_INT8_PRODUCTS} do not"
                )
            split_multiples(scales[:, : layout.num_normal_groups])
    except (ShapeError, QuantizationError) as error:
        return str(error)
    return None
