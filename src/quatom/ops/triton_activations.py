# mypy: ignore-errors
"""Activations of feed-forward layers in Triton kernels, float32."""

import triton
import triton.language as tl

KINDS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "clamped_swiglu": 4, "relu2": 5}
"""ACTIVATION of the kernels."""


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation of float32 numbers."""
    if ACTIVATION == 0:
        return x / (1.0 + tl.exp(-x))
    if ACTIVATION == 1:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    if ACTIVATION == 2:
        # (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)), with u = sqrt(2 / pi) (x + 0.044715 x**3).
        return x / (1.0 + tl.exp(-1.5957691216057308 * x * (1.0 + 0.044715 * x * x)))
    if ACTIVATION == 4:
        x = tl.where(x > 7.0, 7.0, x)  # NaN stays NaN, here and below
        return x / (1.0 + tl.exp(-1.702 * x))
    if ACTIVATION == 5:
        x = tl.where(x < 0.0, 0.0, x)
        return x * x
    return tl.where(x < 0.0, 0.0, x)


@triton.jit
def lift(up, ACTIVATION: tl.constexpr):
    """What an activated gate is multiplied by."""
    if ACTIVATION == 4:
        return tl.where(up > 7.0, 7.0, tl.where(up < -7.0, -7.0, up)) + 1.0
    return up
