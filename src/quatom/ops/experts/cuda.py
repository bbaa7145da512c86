"""The Hopper kernel of `expert_linear`: that of `linear` over runs of tokens, arranged first.

Two launches, whose sizes depend on T, k and E alone. `arrange.cu` turns the offsets of the experts
into tiles of tokens and copies rows into grouped order, each run from a multiple of 16 rows on: the
multiplication then brings a tile of tokens by one bulk copy, as for a dense layer. Rows that are in
grouped order already stay where they are; the first tile of a run begins up to 15 rows early. What
follows on the same groups can be arranged with the first product: it is one launch then, and
fetches weights while the kernel before it still runs.
"""

import ctypes
from functools import cache

import torch
from torch import Tensor

from quatom.ops.activations import MixedTensor
from quatom.ops.backend import Backend
from quatom.ops.cuda_build import (
    CudaKernel,
    KernelArguments,
    compile_cubin,
    load_kernel,
    multiprocessors,
    read_source,
)
from quatom.ops.experts.configs import choose_expert_config
from quatom.ops.experts.prepared import PreparedExperts
from quatom.ops.experts.routing import TokenGroups
from quatom.ops.groups_layout import GROUP_BYTES, TOKEN_PADDING
from quatom.ops.linear.configs import Config
from quatom.ops.linear.cuda import LinearArguments, check_operands, hopper_kernel, unit_value

_THREADS = 256
"""Of a CTA of arrange.cu."""
_ARRANGE_CTAS_PER_SM = 5
"""CTAs of arrange.cu that an SM holds, as its source says."""


class _ArrangeArguments(KernelArguments):
    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("to", ctypes.c_void_p),
        ("to_scales", ctypes.c_void_p),
        ("runs", ctypes.c_void_p),
        ("experts", ctypes.c_int),
        ("tokens_padded", ctypes.c_int),
        ("rows_padded", ctypes.c_int),
        ("groups", ctypes.c_int),
        ("top_k", ctypes.c_int),
        ("tile_rows", ctypes.c_int),
        ("alignment", ctypes.c_int),
        ("parts", ctypes.c_int),
        ("next_runs", ctypes.c_void_p),
        ("next_tile_rows", ctypes.c_int),
        ("next_alignment", ctypes.c_int),
    )


class _ExpertArguments(KernelArguments):
    _fields_ = (
        *LinearArguments._fields_,
        ("runs", ctypes.c_void_p),
        ("runs_known", ctypes.c_int),
    )


def arrange_source() -> str:
    """arrange.cu after the code that CUDA sources share."""
    return read_source("quatom.ops.experts", "arrange.cu")


@cache
def _arrange_kernel(device: int, experts: int) -> CudaKernel:
    cubin = compile_cubin(arrange_source(), "sm_90a")
    with torch.cuda.device(device):
        return load_kernel(
            cubin, "arrange_experts", threads=_THREADS, shared_bytes=4 * 4 * (experts + 1)
        )


def experts_cuda(
    x: MixedTensor | Tensor,
    experts: PreparedExperts,
    groups: TokenGroups,
    top_k: int | None,
    config: Config | None = None,
    *,
    following: PreparedExperts | None = None,
    overlap: bool = True,
) -> Tensor:
    """See `expert_linear`.

    Args:
        x: as `expert_linear` takes it.
        experts: packed by `linear.hopper_layout.pack_weights`, with a leading dimension E.
        groups: of `group_tokens`.
        top_k: see `expert_linear`.
        config: overrides the choice of variant, for measurements.
        following: see `expert_linear`.
        overlap: let the kernels start while those before them end.
    """
    x = check_operands(x, experts.tensors, config)
    packed, *row_scales = experts.tensors
    positions, channels = groups.slots.numel(), experts.out_channels
    y = torch.empty((positions, channels), dtype=x.dtype, device=x.device)
    if not positions:
        return y
    device = packed.device.index
    config = config or _choose_config(experts, positions, top_k)
    known = groups.tiles.get(config.tokens) if top_k is None else None
    if known is not None:
        codes, scales, runs = x.codes, x.scales, known
    else:
        following_rows = 0
        if top_k and following is not None and following.backend is Backend.CUDA:
            following_rows = _choose_config(following, positions, None).tokens
        codes, scales, runs = _arrange(
            x, groups, top_k, config.tokens, following_rows, overlap=overlap
        )
    tiles = (runs.shape[0] - 1) * -(-packed.shape[1] // config.row_blocks)
    layout = x.spec.layout
    hopper_kernel(config, x.dtype, device).launch(
        min(tiles, multiprocessors(device) * config.ctas_per_sm),
        _ExpertArguments(
            packed.data_ptr(),
            codes.data_ptr(),
            scales.data_ptr(),
            row_scales[0].data_ptr() if row_scales else None,
            None if experts.bias is None else experts.bias.data_ptr(),
            y.data_ptr(),
            positions,
            codes.shape[1],
            channels,
            layout.num_normal_groups,
            layout.num_outlier_groups,
            unit_value(x),
            runs.data_ptr(),
            known is not None,
        ),
        overlap=overlap,
    )
    return y


def _choose_config(experts: PreparedExperts, positions: int, top_k: int | None) -> Config:
    packed, *row_scales = experts.tensors
    return choose_expert_config(
        positions,
        experts.num_experts,
        *packed.shape[1:3],
        multiprocessors(packed.device.index),
        integer=bool(row_scales),
        in_place=top_k is None,
    )


def _arrange(
    x: MixedTensor,
    groups: TokenGroups,
    top_k: int | None,
    tile_rows: int,
    following_rows: int,  # of a tile of the product that follows, 0: it arranges itself
    *,
    overlap: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and scales in grouped order, and the runs: (1 + most tiles, 4) int32."""
    num_experts = groups.num_experts
    runs = _empty_runs(groups, tile_rows, in_place=not top_k)
    next_runs = _empty_runs(groups, following_rows, in_place=True) if following_rows else None
    codes, scales = x.codes, x.scales
    ctas, parts = -(-(runs.shape[0] - 1) // _THREADS), 1
    if top_k:
        positions = groups.slots.numel()
        used = min(positions, num_experts)  # experts that can have rows
        blocks = (positions + used * (TOKEN_PADDING - 1)) // TOKEN_PADDING
        num_groups = codes.shape[0]
        codes = codes.new_empty((num_groups, blocks * TOKEN_PADDING, GROUP_BYTES))
        scales = scales.new_empty((num_groups, blocks, 2, TOKEN_PADDING))
        # Two CTAs an SM where groups suffice, of which a CTA takes two at a time.
        parts = max(1, min(2 * multiprocessors(x.device.index) // blocks, num_groups // 4))
        # More rows are taken in turns: what each CTA finds out first takes as long as a block.
        ctas = min(
            blocks * parts, _ARRANGE_CTAS_PER_SM * multiprocessors(x.device.index) // parts * parts
        )
    _arrange_kernel(x.device.index, num_experts).launch(
        ctas,
        _ArrangeArguments(
            x.codes.data_ptr(),
            x.scales.data_ptr(),
            groups.slots.data_ptr(),
            groups.offsets.data_ptr(),
            codes.data_ptr() if top_k else None,
            scales.data_ptr() if top_k else None,
            runs.data_ptr(),
            num_experts,
            x.codes.shape[1],
            codes.shape[1],
            codes.shape[0],
            top_k or 0,
            tile_rows,
            min(tile_rows, TOKEN_PADDING),
            parts,
            None if next_runs is None else next_runs.data_ptr(),
            following_rows,
            min(following_rows, TOKEN_PADDING),
        ),
        overlap=overlap,
    )
    if next_runs is not None:
        groups.tiles[following_rows] = next_runs
    return codes, scales, runs


def _empty_runs(groups: TokenGroups, tile_rows: int, *, in_place: bool) -> Tensor:
    positions = groups.slots.numel()
    used = min(positions, groups.num_experts)
    early = TOKEN_PADDING - 1 if in_place else 0
    most_tiles = (positions + used * (tile_rows - 1 + early)) // tile_rows
    return groups.slots.new_empty((1 + most_tiles, 4))
