"""Triton kernel for `gated_quantize`: a program quantizes some groups of one token."""

import triton
import triton.language as tl
from torch import Tensor

from quatom.families.spec import Activation
from quatom.ops.activations import MixedTensor, QuantizeSpec
from quatom.ops.triton_activations import KINDS, activate, lift
from quatom.ops.triton_quantize import (
    allocate,
    group_bounds,
    group_width,
    quantize_options,
    store_groups,
)

_TILE = 2048
"""Channels of a program: enough bytes in flight, and several programs for a single token."""


@triton.jit
def _gated_quantize_kernel(
    gate_up_ptr,  # (T, 2 I), or (T, I) unless GATED
    codes_ptr,
    scales_ptr,
    row_stride,
    tokens_padded,
    clip_ratio,
    normal_largest,
    outlier_largest,
    MIN_SCALE: tl.constexpr,
    NORMAL: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    OUTLIERS: tl.constexpr,
    OUTLIER_SIZE: tl.constexpr,
    NUM_SCALES: tl.constexpr,
    NORMAL_KIND: tl.constexpr,
    OUTLIER_KIND: tl.constexpr,
    GROUPS_LAYOUT: tl.constexpr,
    ROTATE_STAGES: tl.constexpr,
    SCALE_MODE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    SB: tl.constexpr,  # groups of a program
    WIDTH: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)  # T * 2 I overflows int32 on long prefills
    s = tl.program_id(1) * SB + tl.arange(0, SB)
    column = tl.arange(0, WIDTH)
    first, end = group_bounds(s, NORMAL, GROUP_SIZE, OUTLIER_SIZE)
    channel = first[:, None] + column[None, :]
    mask = (channel < end[:, None]) & (s < NUM_SCALES)[:, None]
    gate_ptr = gate_up_ptr + token * row_stride + channel
    x = activate(tl.load(gate_ptr, mask=mask, other=0.0).to(tl.float32), ACTIVATION)
    if GATED:
        up = tl.load(gate_ptr + NORMAL + OUTLIERS, mask=mask, other=0.0).to(tl.float32)
        x *= lift(up, ACTIVATION)
    store_groups(
        x,
        s,
        column,
        token,
        codes_ptr,
        scales_ptr,
        tokens_padded,
        clip_ratio,
        normal_largest,
        outlier_largest,
        MIN_SCALE,
        NORMAL,
        GROUP_SIZE,
        OUTLIERS,
        OUTLIER_SIZE,
        NUM_SCALES,
        NORMAL_KIND,
        OUTLIER_KIND,
        GROUPS_LAYOUT,
        ROTATE_STAGES,
        SCALE_MODE,
    )


def gated_quantize_triton(
    gate_up: Tensor, spec: QuantizeSpec, activation: Activation, gated: bool
) -> MixedTensor:
    """See `gated_quantize`. CUDA, or the CPU under TRITON_INTERPRET=1."""
    tokens = gate_up.shape[0]
    out = allocate(gate_up, tokens, spec)
    if not tokens:
        return out
    width = group_width(spec)
    groups = triton.next_power_of_2(spec.layout.num_scales)
    if spec.scale_mode == "group":
        groups = min(groups, max(1, _TILE // width))
    _gated_quantize_kernel[(tokens, triton.cdiv(spec.layout.num_scales, groups))](
        gate_up,
        out.codes,
        out.scales,
        gate_up.stride(0),
        out.codes.shape[1],
        ACTIVATION=KINDS[activation],
        GATED=gated,
        SB=groups,
        WIDTH=width,
        num_warps=4 if groups * width <= _TILE else 8 if groups * width <= 4 * _TILE else 16,
        **quantize_options(spec),
    )
    return out
