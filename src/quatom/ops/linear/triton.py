"""Triton kernel for `linear`: the portable path, sm_80 and later and the CPU interpreter.

One kernel serves all schemes; `triton_product` says how it multiplies.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quatom.errors import BackendError
from quatom.numerics.groups import GroupLayout
from quatom.ops.activations import MixedTensor
from quatom.ops.cuda_build import multiprocessors
from quatom.ops.linear.triton_product import block_channels, layout_options, sum_groups, tile_rows

_ROWS = 64
"""BN: output channels of a program."""


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
    wide_n = n.to(tl.int64)[:, None]
    ALL_BLOCKS: tl.constexpr = (
        (NORMAL + GROUP_SIZE - 1) // GROUP_SIZE * ((GROUP_SIZE + BK - 1) // BK)
    )
    total = sum_groups(
        x_ptr + t.to(tl.int64)[:, None] * x_row_stride,
        xs_ptr + t * NUM_SCALES,
        w_ptr + wide_n * w_row_stride,
        outlier_ptr + wide_n * OUTLIERS,
        ws_ptr + n * NUM_SCALES,
        in_t,
        in_n,
        part * ALL_BLOCKS // SPLIT,
        (part + 1) * ALL_BLOCKS // SPLIT,
        part == SPLIT - 1,
        NORMAL, GROUP_SIZE, OUTLIERS, OUTLIER_SIZE, PACKED, FLOATS, HAS_XS, True, BM, BN, BK,
    )  # fmt: skip
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
    bm = tile_rows(tokens)
    packed = weights.dtype is torch.uint8
    tiles = triton.cdiv(channels, _ROWS), triton.cdiv(tokens, bm)
    if split is None:
        blocks = layout.num_normal_groups * triton.cdiv(layout.group_size, block_channels(layout))
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
        FLOATS=codes.dtype is not torch.int8,
        HAS_XS=is_mixed,
        HAS_BIAS=bias is not None,
        SPLIT=split,
        BM=bm,
        BN=_ROWS,
        num_warps=4,
        **layout_options(layout, packed=packed),
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
