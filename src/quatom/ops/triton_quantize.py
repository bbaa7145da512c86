# mypy: ignore-errors
"""What the Triton quantize kernels share: scale, round and store the groups of one token.

A kernel brings its values as a tile of (groups, WIDTH) float32 numbers, zero outside a group, and
calls `store_groups`. All S groups, normal ones, a short last one and outliers, are rows of that
tile: they differ in their first channel, size, largest code and clip ratio.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quatom.errors import BackendError
from quatom.numerics.formats import get_format
from quatom.numerics.groups import MIN_SCALE, GroupLayout
from quatom.numerics.hadamard import hadamard_block
from quatom.ops.activations import (
    MixedTensor,
    QuantizeSpec,
    allocate_groups,
    row_dtype,
)
from quatom.ops.groups_layout import GROUP_BYTES

INTEGER, E4M3, FLOAT16, INT8 = 0, 1, 2, 3
_SCALE_MODES = {"group": 0, "row": 1, "multiples": 2}


@triton.jit
def round_half_even(x):
    """Round float32 |x| < 2**22 to the nearest integer, ties to even.

    Adding and subtracting 1.5 * 2**23 does it the IEEE way, in Triton's CPU interpreter too.
    """
    return (x + 12582912.0) - 12582912.0


@triton.jit
def round_e4m3(x):
    """Round float32 to the nearest e4m3 number, ties to even, saturating at 448."""
    x = tl.minimum(tl.maximum(x, -448.0), 448.0)
    power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    # The same trick as above with an addend whose last bit is e4m3's: 2**-3 of the power of two
    # below x, and 2**-9 among the subnormals.
    magic = tl.maximum(power, 0.015625) * 1572864.0
    return (x + magic) - magic


@triton.jit
def e4m3_byte(x):
    """The byte of a float32 that is an e4m3 number."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = (magnitude >> 20) - 960  # exponent bias 127 becomes 7
    subnormal = (tl.abs(x) * 512.0).to(tl.int32)
    return tl.where(magnitude >= 0x3C800000, normal, subnormal) | ((bits >> 24) & 0x80)


@triton.jit
def group_bounds(s, NORMAL: tl.constexpr, GROUP_SIZE: tl.constexpr, OUTLIER_SIZE: tl.constexpr):
    """First channel and end of each group s."""
    G: tl.constexpr = (NORMAL + GROUP_SIZE - 1) // GROUP_SIZE
    is_outlier = s >= G
    first = tl.where(is_outlier, NORMAL + (s - G) * OUTLIER_SIZE, s * GROUP_SIZE)
    size = tl.where(is_outlier, OUTLIER_SIZE, tl.minimum(GROUP_SIZE, NORMAL - s * GROUP_SIZE))
    return first, first + size


@triton.jit
def rotate_tile(
    x,  # (SB, WIDTH) float32
    block,  # (SB,) columns that mix, a power of two; 1 leaves the row as it is
    STAGES: tl.constexpr,
):
    """Multiply every `block` columns of each row by a Hadamard matrix, by butterflies."""
    SB: tl.constexpr = x.shape[0]
    WIDTH: tl.constexpr = x.shape[1]
    for stage in tl.static_range(STAGES):
        # Columns c and c + 2**stage meet.
        pairs = tl.reshape(x, (SB, WIDTH // (2 << stage), 2, 1 << stage))
        a, b = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
        mixed = tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2))
        x = tl.where((block > (1 << stage))[:, None], tl.reshape(mixed, (SB, WIDTH)), x)
    return x * tl.div_rn(1.0, tl.sqrt_rn(block.to(tl.float32)))[:, None]


@triton.jit
def store_groups(
    x,  # (SB, WIDTH) float32, zero outside a group
    s,  # (SB,) group of each row
    column,  # (WIDTH,)
    token,
    codes_ptr,
    scales_ptr,
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
    SCALE_MODE: tl.constexpr,  # but for GROUP, s must be all groups of the token
):
    """Quantize the groups s of one token and store codes and scales."""
    G: tl.constexpr = (NORMAL + GROUP_SIZE - 1) // GROUP_SIZE
    is_outlier = s >= G
    if ROTATE_STAGES > 0:
        rest: tl.constexpr = NORMAL % GROUP_SIZE
        size = tl.where((s == G - 1) & (rest > 0), rest, GROUP_SIZE)
        block = tl.where(is_outlier, 1, size & -size)  # the largest power of two that divides it
        x = rotate_tile(x, block, ROTATE_STAGES)
    absmax = tl.max(tl.abs(x), axis=1)
    if SCALE_MODE == 1:
        absmax = tl.where(is_outlier, absmax, tl.max(tl.where(is_outlier, 0.0, absmax), axis=0))
    largest = tl.where(is_outlier, outlier_largest, normal_largest)
    clipped = absmax * tl.where(is_outlier, 1.0, clip_ratio)
    # The stored float16 scale divides, by true division: `/` alone may be off by an ulp.
    scale = tl.maximum(tl.div_rn(clipped, largest), MIN_SCALE).to(tl.float16).to(tl.float32)
    if SCALE_MODE == 2:
        # A 16th of the token's largest scale, rounded up to 7 bits: see quatom.numerics.multiples.
        top = tl.max(tl.where(is_outlier, 0.0, scale), axis=0) * 0.0625
        bits = (top.to(tl.int32, bitcast=True) + 0x1FFFF) & -0x20000
        row_scale = tl.where(is_outlier, scale, bits.to(tl.float32, bitcast=True))
        multiple = tl.maximum(round_half_even(tl.div_rn(scale, row_scale)), 1.0)
        multiple = tl.where(is_outlier, 1.0, tl.minimum(multiple, 16.0))
        scale = multiple * row_scale
    if NORMAL_KIND == 2:
        scale = tl.where(is_outlier, scale, 1.0)
    if OUTLIER_KIND == 2:
        scale = tl.where(is_outlier, 1.0, scale)
    units = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))

    low = -largest - 1.0
    code = tl.minimum(tl.maximum(round_half_even(units), low[:, None]), largest[:, None])
    if NORMAL_KIND == 1:
        code = tl.where(is_outlier[:, None], code, round_e4m3(units))
    if NORMAL_KIND == 2:
        code = tl.where(is_outlier[:, None], code, units.to(tl.float16).to(tl.float32))
    if OUTLIER_KIND == 2:
        code = tl.where(is_outlier[:, None], units.to(tl.float16).to(tl.float32), code)

    exists = s < NUM_SCALES
    first, end = group_bounds(s, NORMAL, GROUP_SIZE, OUTLIER_SIZE)
    if GROUPS_LAYOUT:
        integer = code.to(tl.int32)
        if NORMAL_KIND == 1:
            byte = e4m3_byte(code)
        elif NORMAL_KIND == 3:
            byte = integer & 0xFF
        elif SCALE_MODE == 2:
            byte = (integer * multiple.to(tl.int32)[:, None]) & 0xFF
        else:  # an integer's magnitude is the e4m3 byte of magnitude * 2**-9
            byte = tl.abs(integer) | ((integer >> 24) & 0x80)
        byte = tl.where(is_outlier[:, None], integer & 0xFF, byte)
        place = (((column >> 4) ^ (token & 7).to(tl.int32)) << 4) | (column & 15)
        row = s.to(tl.int64) * tokens_padded + token
        mask = exists[:, None] & (column < 128)[None, :]
        tl.store(codes_ptr + row[:, None] * 128 + place[None, :], byte.to(tl.uint8), mask=mask)
        # See the byte layout `groups`: weights enter the matrix unit as (code + 8) * 2**-9.
        total = tl.sum(code, axis=1) * (-0.015625 if NORMAL_KIND == 1 else -0.000030517578125)
        t = token & 15
        place = (row - t) * 2 + (t & 6) * 2 + (t >> 3) * 2 + (t & 1)
        tl.store(scales_ptr + place, row_scale if SCALE_MODE == 2 else scale, mask=exists)
        holds_int8 = (NORMAL_KIND == 3) or (SCALE_MODE == 2)
        correction = tl.where(is_outlier | holds_int8, 0.0, total * scale)
        tl.store(scales_ptr + place + 16, correction, mask=exists)
    else:
        channel = first[:, None] + column[None, :]
        mask = exists[:, None] & (channel < end[:, None])
        out = codes_ptr + token * (NORMAL + OUTLIERS) + channel
        tl.store(out, code.to(codes_ptr.dtype.element_ty), mask=mask)
        tl.store(scales_ptr + token * NUM_SCALES + s, scale, mask=exists)


def _kind(name: str) -> int:
    if get_format(name).is_integer:
        return INT8 if name == "int8" else INTEGER
    if name == "e4m3":
        return E4M3
    if name == "float16":
        return FLOAT16
    raise BackendError(
        f"the Triton quantize kernels have no format {name}; use the reference backend"
    )


def allocate(x: Tensor, tokens: int, spec: QuantizeSpec) -> MixedTensor:
    """An unwritten result for `tokens` tokens on x's device."""
    if spec.byte_layout == "groups":
        return allocate_groups(x, tokens, spec)
    if spec.byte_layout == "padded":
        raise BackendError(
            "the Triton quantize kernels write byte layouts 'rows' and 'groups', not 'padded', "
            "which int8 products on a CPU read; use the reference backend"
        )
    codes = x.new_empty((tokens, spec.layout.channels), dtype=row_dtype(spec, x.dtype))
    scales = x.new_empty((tokens, spec.layout.num_scales), dtype=torch.float32)
    return MixedTensor(codes=codes, scales=scales, spec=spec, tokens=tokens, dtype=x.dtype)


def group_width(spec: QuantizeSpec) -> int:
    """WIDTH: columns of the tile, the widest group rounded up to a power of two."""
    width = triton.next_power_of_2(max(spec.layout.group_sizes))
    return max(width, GROUP_BYTES) if spec.byte_layout == "groups" else width


def _rotation_stages(layout: GroupLayout) -> int:
    """Butterfly stages of the widest rotation: log2 of its block."""
    sizes = layout.group_sizes[: layout.num_normal_groups]
    return max(hadamard_block(size) for size in sizes).bit_length() - 1


def quantize_options(spec: QuantizeSpec) -> dict[str, Any]:
    """The arguments of `store_groups` that follow from the spec."""
    layout = spec.layout
    outlier = spec.outlier if layout.outliers else "int8"
    if outlier == "e4m3":
        raise BackendError("the Triton quantize kernels keep outliers in int8 or float16, not e4m3")
    return {
        "clip_ratio": spec.clip_ratio,
        "normal_largest": get_format(spec.normal).largest,
        "outlier_largest": get_format(outlier).largest,
        "MIN_SCALE": MIN_SCALE,
        "NORMAL": layout.normal,
        "GROUP_SIZE": layout.group_size,
        "OUTLIERS": layout.outliers,
        "OUTLIER_SIZE": max(1, layout.outliers // layout.outlier_blocks),
        "NUM_SCALES": layout.num_scales,
        "NORMAL_KIND": _kind(spec.normal),
        "OUTLIER_KIND": _kind(outlier),
        "GROUPS_LAYOUT": spec.byte_layout == "groups",
        "ROTATE_STAGES": _rotation_stages(layout) if spec.rotate else 0,
        "SCALE_MODE": _SCALE_MODES[spec.scale_mode],
    }
