"""What Triton kernels of `linear` and `experts` share: the product of rows over all groups.

Normal groups are multiplied in blocks of at most 128 channels, as int8 where both operands are
integers and as floating-point numbers otherwise (codes of every format are exact in float16 and
bfloat16); a group's partial sum is scaled once, at its end. Weights of up to 4 bits are packed two
to a byte, a block's first half of channels in the low nibbles and its second half in the high ones,
so that unpacking needs no interleaving: two dots of half a block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quatom.numerics.groups import GroupLayout


@triton.jit
def _multiply(x, w, partial, FLOATS: tl.constexpr):
    if FLOATS:  # no early return: the compiler would go on into the other branch
        partial = tl.dot(x, tl.trans(w.to(x.dtype)), partial)
    else:
        partial = tl.dot(x, tl.trans(w), partial, out_dtype=tl.int32)
    return partial


@triton.jit
def _multiply_block(
    partial,  # (BM, BN)
    x_row_ptr,  # (BM, 1)
    w_row_ptr,  # (BN, 1)
    g,
    b,
    in_t,
    in_n,
    NORMAL: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    PACKED: tl.constexpr,
    FLOATS: tl.constexpr,
    BK: tl.constexpr,
):
    """Add the product over block b of normal group g."""
    HALF: tl.constexpr = BK // 2
    BLOCKS: tl.constexpr = (GROUP_SIZE + BK - 1) // BK
    end = tl.minimum((g + 1) * GROUP_SIZE, NORMAL)
    if PACKED:
        j = tl.arange(0, HALF)
        low = g * GROUP_SIZE + b * BK + j
        high = low + HALF
        offset = (g * BLOCKS + b) * HALF + j
        w = tl.load(w_row_ptr + offset[None, :], mask=in_n[:, None], other=0)
        x = tl.load(x_row_ptr + low[None, :], mask=in_t[:, None] & (low < end)[None, :], other=0)
        partial = _multiply(x, (w << 4) >> 4, partial, FLOATS)
        x = tl.load(x_row_ptr + high[None, :], mask=in_t[:, None] & (high < end)[None, :], other=0)
        partial = _multiply(x, w >> 4, partial, FLOATS)
    else:
        k = g * GROUP_SIZE + b * BK + tl.arange(0, BK)
        inside = (k < end)[None, :]
        w = tl.load(w_row_ptr + k[None, :], mask=in_n[:, None] & inside, other=0)
        x = tl.load(x_row_ptr + k[None, :], mask=in_t[:, None] & inside, other=0)
        partial = _multiply(x, w, partial, FLOATS)
    return partial


@triton.jit
def sum_groups(
    x_row_ptr,  # (BM, 1) rows of codes
    xs_row_ptr,  # (BM,) rows of scales
    w_row_ptr,  # (BN, 1)
    outlier_row_ptr,  # (BN, 1)
    ws_row_ptr,  # (BN,)
    in_t,  # (BM,)
    in_n,  # (BN,)
    first,  # blocks of normal channels to multiply, from the first one
    last,  # to the one before this
    with_outliers,
    NORMAL: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    OUTLIERS: tl.constexpr,
    OUTLIER_SIZE: tl.constexpr,
    PACKED: tl.constexpr,
    FLOATS: tl.constexpr,
    HAS_XS: tl.constexpr,
    HAS_WS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Scaled sum over groups of the product of BM rows of activations and BN of weights."""
    G: tl.constexpr = (NORMAL + GROUP_SIZE - 1) // GROUP_SIZE
    BLOCKS: tl.constexpr = (GROUP_SIZE + BK - 1) // BK
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for g in range(first // BLOCKS, (last + BLOCKS - 1) // BLOCKS):
        if FLOATS:
            partial = tl.zeros((BM, BN), dtype=tl.float32)
        else:
            partial = tl.zeros((BM, BN), dtype=tl.int32)
        if BLOCKS == 1:  # no inner loop: Triton pipelines the innermost one
            partial = _multiply_block(
                partial, x_row_ptr, w_row_ptr, g, 0, in_t, in_n,
                NORMAL, GROUP_SIZE, PACKED, FLOATS, BK,
            )  # fmt: skip
        else:
            begin = tl.maximum(first - g * BLOCKS, 0)
            for b in range(begin, tl.minimum(last - g * BLOCKS, BLOCKS)):
                partial = _multiply_block(
                    partial, x_row_ptr, w_row_ptr, g, b, in_t, in_n,
                    NORMAL, GROUP_SIZE, PACKED, FLOATS, BK,
                )  # fmt: skip
        scaled = partial.to(tl.float32)
        if HAS_XS:
            scaled *= tl.load(xs_row_ptr + g, mask=in_t, other=0.0)[:, None]
        if HAS_WS:
            scaled *= tl.load(ws_row_ptr + g, mask=in_n, other=0.0)[None, :]
        total += scaled

    if OUTLIERS > 0:  # noqa: SIM102 (a constexpr branch)
        if with_outliers:
            for o in range(OUTLIERS // OUTLIER_SIZE):
                if FLOATS:
                    partial = tl.zeros((BM, BN), dtype=tl.float32)
                else:
                    partial = tl.zeros((BM, BN), dtype=tl.int32)
                for b in range((OUTLIER_SIZE + BK - 1) // BK):
                    r = b * BK + tl.arange(0, BK)
                    inside = (r < OUTLIER_SIZE)[None, :]
                    k = (o * OUTLIER_SIZE + r)[None, :]
                    w = tl.load(outlier_row_ptr + k, mask=in_n[:, None] & inside, other=0)
                    x = tl.load(x_row_ptr + NORMAL + k, mask=in_t[:, None] & inside, other=0)
                    partial = _multiply(x, w, partial, FLOATS)
                ws = tl.load(ws_row_ptr + G + o, mask=in_n, other=0.0)
                scaled = partial.to(tl.float32)
                if HAS_XS:
                    scaled *= tl.load(xs_row_ptr + G + o, mask=in_t, other=0.0)[:, None]
                total += scaled * ws[None, :]
    return total


def block_channels(layout: GroupLayout) -> int:
    """BK: channels of a dot; half of it must still be 32 wide for int8."""
    return 128 if layout.group_size > 64 else 64


def tile_rows(rows: float) -> int:
    """BM: rows of x of a program that has about `rows` of them."""
    return 16 if rows <= 16 else 32 if rows <= 32 else 64


def layout_options(layout: GroupLayout, *, packed: bool) -> dict[str, int | bool]:
    """Constants of a launch that follow from the groups and from how weights are stored."""
    return {
        "NORMAL": layout.normal,
        "GROUP_SIZE": layout.group_size,
        "OUTLIERS": layout.outliers,
        "OUTLIER_SIZE": max(1, layout.outliers // layout.outlier_blocks),
        "NUM_SCALES": layout.num_scales,
        "PACKED": packed,
        "BK": block_channels(layout),
        "num_stages": 3 if packed else 5,
    }


def prepare_triton(
    values: Tensor, scales: Tensor, layout: GroupLayout, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (uint8 where packed, else int8), outliers and scales as the kernel reads them."""
    normal = values[:, : layout.normal].to(torch.int8)
    outliers = values[:, layout.normal :].to(torch.int8).contiguous()
    if bits <= 4:
        block = block_channels(layout)
        blocks = -(-layout.group_size // block)
        groups = normal.new_zeros(
            (values.shape[0], layout.num_normal_groups, blocks * block), dtype=torch.int8
        )
        for g, part in enumerate(normal.split(layout.group_size, dim=1)):
            groups[:, g, : part.shape[1]] = part
        low, high = groups.unflatten(2, (blocks, 2, block // 2)).unbind(dim=3)
        normal = ((low & 0xF) | (high << 4)).flatten(1).view(torch.uint8)
    return normal.contiguous(), outliers, scales.float().contiguous()
