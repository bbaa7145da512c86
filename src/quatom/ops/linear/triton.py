"""Triton kernel for `linear`: the portable path, sm_80 and later and the CPU interpreter.

One kernel serves all schemes. Normal groups are multiplied in blocks of at most 128 channels, as
int8 where both operands are integers and as floating-point numbers otherwise (codes of every format
are exact in float16 and bfloat16); a group's partial sum is scaled once, at its end. Weights of up
to 4 bits are packed two to a byte, a block's first half of channels in the low nibbles and its
second half in the high ones, so that unpacking needs no interleaving: two dots of half a block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quatom.errors import BackendError
from quatom.numerics.groups import GroupLayout
from quatom.ops.activations import MixedTensor
from quatom.ops.cuda_build import multiprocessors

_ROWS = 64
"""BN: output channels of a program."""


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


@triton.jit(do_not_specialize=["T"])  # steps of every length run one variant
def _linear_kernel(
    x_ptr,  # (T, K) int8 or floating-point codes
    xs_ptr,  # (T, S) float32, or x_ptr where activations carry no scales
    w_ptr,  # packed: (N, blocks * BK / 2) int8; else (N, NORMAL) int8
    outlier_ptr,  # (N, OUTLIERS) int8
    ws_ptr,  # (N, S) float32
    bias_ptr,  # (N,) float32, or ws_ptr where there is none
    y_ptr,  # (T, N); split: (SPLIT, T, N) float32
    T,
    N,
    x_row_stride,
    w_row_stride,
    NORMAL: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    OUTLIERS: tl.constexpr,
    OUTLIER_SIZE: tl.constexpr,
    NUM_SCALES: tl.constexpr,
    PACKED: tl.constexpr,
    FLOATS: tl.constexpr,
    HAS_XS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLIT: tl.constexpr,  # programs that share the blocks of normal channels
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    t = tl.program_id(1) * BM + tl.arange(0, BM)
    part = tl.program_id(2)
    in_n = n < N
    in_t = t < T
    x_row_ptr = x_ptr + t.to(tl.int64)[:, None] * x_row_stride
    w_row_ptr = w_ptr + n.to(tl.int64)[:, None] * w_row_stride
    G: tl.constexpr = (NORMAL + GROUP_SIZE - 1) // GROUP_SIZE
    BLOCKS: tl.constexpr = (GROUP_SIZE + BK - 1) // BK
    first = part * (G * BLOCKS) // SPLIT
    last = (part + 1) * (G * BLOCKS) // SPLIT
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
        ws = tl.load(ws_ptr + n * NUM_SCALES + g, mask=in_n, other=0.0)
        scaled = partial.to(tl.float32)
        if HAS_XS:
            scaled *= tl.load(xs_ptr + t * NUM_SCALES + g, mask=in_t, other=0.0)[:, None]
        total += scaled * ws[None, :]

    if OUTLIERS > 0:  # noqa: SIM102 (a constexpr branch)
        if part == SPLIT - 1:
            for o in range(OUTLIERS // OUTLIER_SIZE):
                if FLOATS:
                    partial = tl.zeros((BM, BN), dtype=tl.float32)
                else:
                    partial = tl.zeros((BM, BN), dtype=tl.int32)
                for b in range((OUTLIER_SIZE + BK - 1) // BK):
                    r = b * BK + tl.arange(0, BK)
                    inside = (r < OUTLIER_SIZE)[None, :]
                    k = (o * OUTLIER_SIZE + r)[None, :]
                    w_ptrs = outlier_ptr + n.to(tl.int64)[:, None] * OUTLIERS + k
                    w = tl.load(w_ptrs, mask=in_n[:, None] & inside, other=0)
                    x = tl.load(x_row_ptr + NORMAL + k, mask=in_t[:, None] & inside, other=0)
                    partial = _multiply(x, w, partial, FLOATS)
                ws = tl.load(ws_ptr + n * NUM_SCALES + G + o, mask=in_n, other=0.0)
                scaled = partial.to(tl.float32)
                if HAS_XS:
                    xs = tl.load(xs_ptr + t * NUM_SCALES + G + o, mask=in_t, other=0.0)
                    scaled *= xs[:, None]
                total += scaled * ws[None, :]

    if HAS_BIAS:  # noqa: SIM102 (a constexpr branch)
        if part == SPLIT - 1:
            total += tl.load(bias_ptr + n, mask=in_n, other=0.0)[None, :]
    row = part.to(tl.int64) * T + t
    out = y_ptr + row[:, None] * N + n[None, :]
    tl.store(out, total.to(y_ptr.dtype.element_ty), mask=in_t[:, None] & in_n[None, :])


@triton.jit(do_not_specialize=["SIZE"])
def _sum_parts_kernel(
    parts_ptr,  # (SPLIT, SIZE) float32
    y_ptr,  # (SIZE,)
    SIZE,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < SIZE
    total = tl.load(parts_ptr + at, mask=inside, other=0.0)
    for part in tl.static_range(1, SPLIT):  # a fixed order: the sum is deterministic
        total += tl.load(parts_ptr + part * SIZE + at, mask=inside, other=0.0)
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=inside)


def block_channels(layout: GroupLayout) -> int:
    """BK: channels of a dot; half of it must still be 32 wide for int8."""
    return 128 if layout.group_size > 64 else 64


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


def linear_triton(
    x: MixedTensor | Tensor,
    tensors: tuple[Tensor, ...],
    layout: GroupLayout,
    channels: int,
    bias: Tensor | None,
    *,
    split: int | None = None,
) -> Tensor:
    """See `linear`. CUDA, or the CPU under TRITON_INTERPRET=1.

    Args:
        split: programs that share an output tile's channels and add up afterwards; None: as many
            as fill the GPU.
    """
    weights, outliers, weight_scales = tensors
    is_mixed = isinstance(x, MixedTensor)
    codes = x.codes if is_mixed else x
    if codes.dtype is torch.float32:
        raise BackendError(
            "the Triton linear kernel reads int8, float16 or bfloat16 activations, got float32: "
            "cast them, or use the reference backend"
        )
    tokens = codes.shape[0]
    y = torch.empty((tokens, channels), dtype=x.dtype, device=codes.device)
    if not tokens:
        return y
    if codes.stride(1) != 1:
        codes = codes.contiguous()
    bm = 16 if tokens <= 16 else 32 if tokens <= 32 else 64
    block = block_channels(layout)
    packed = weights.dtype is torch.uint8
    tiles = triton.cdiv(channels, _ROWS), triton.cdiv(tokens, bm)
    if split is None:
        blocks = layout.num_normal_groups * triton.cdiv(layout.group_size, block)
        split = _choose_split(tiles[0] * tiles[1], blocks, y.device, packed=packed)
    parts = y
    if split > 1:
        parts = torch.empty((split, tokens, channels), dtype=torch.float32, device=y.device)
    _linear_kernel[(*tiles, split)](
        codes,
        x.scales if is_mixed else codes,
        weights.view(torch.int8),
        outliers,
        weight_scales,
        weight_scales if bias is None else bias,
        parts,
        tokens,
        channels,
        codes.stride(0),
        weights.stride(0),
        NORMAL=layout.normal,
        GROUP_SIZE=layout.group_size,
        OUTLIERS=layout.outliers,
        OUTLIER_SIZE=max(1, layout.outliers // layout.outlier_blocks),
        NUM_SCALES=layout.num_scales,
        PACKED=packed,
        FLOATS=codes.dtype is not torch.int8,
        HAS_XS=is_mixed,
        HAS_BIAS=bias is not None,
        SPLIT=split,
        BM=bm,
        BN=_ROWS,
        BK=block,
        num_warps=4,
        num_stages=3 if packed else 5,
    )
    if split > 1:
        _sum_parts_kernel[(triton.cdiv(y.numel(), 512),)](
            parts, y, y.numel(), SPLIT=split, BLOCK=512, num_warps=4
        )
    return y


def _choose_split(tiles: int, blocks: int, device: torch.device, *, packed: bool) -> int:
    """Programs of an output tile: enough to fill the GPU, each with four blocks at least.

    Two programs an SM keep enough bytes in flight; unpacking needs four to hide its instructions.
    """
    if device.type != "cuda":
        return 1
    programs = multiprocessors(device.index) * (4 if packed else 2)
    return max(1, min(programs // tiles, blocks // 4))
