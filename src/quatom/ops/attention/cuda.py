"""The CUDA decode kernel of `attention`: which variant runs, how many splits, its launch."""

import ctypes
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor

from quatom.numerics.kv_pages import KVPages
from quatom.ops.attention import AttentionOptions, Sequences, seen_tokens
from quatom.ops.cuda_build import (
    CudaKernel,
    compile_cubin,
    device_capability,
    device_name,
    load_kernel,
    multiprocessors,
    read_source,
)

_LOG2E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """A compiled variant of the kernel; docs/lab/kernels-attention.md has the measurements."""

    warps: int
    """Warps of a CTA; each walks its own tiles."""
    tile: int
    """Tokens of a tile."""
    stages: int
    """Tiles that a warp has in flight or in work."""
    min_ctas: int
    """CTAs of a multiprocessor that registers must allow."""
    bulk: bool = True
    """Bulk copies (sm_90 and later) instead of cp.async."""

    def shared_bytes(self, head_dim: int, row_tiles: int) -> int:
        """Dynamic shared memory of a CTA: stages, or the exchange between warps if larger."""
        pitch = -(-head_dim // 32) * 16  # bytes of a row of codes
        stages = self.stages * self.tile * 2 * (pitch + 4)
        exchange = 8 * row_tiles * (head_dim + 4 + 2) * 4
        return self.warps * max(stages, exchange)


@dataclass(frozen=True, slots=True)
class DecodeCosts:
    """What a decode costs on a GPU, in the time that a CTA takes for a token on a full SM."""

    shares: tuple[float, float, float, float] = (0.0, 2.0, 2.0, 3.0)
    """What 0 to 3 CTAs of four warps that have an SM for themselves cost for a token of each; four
    cost 4. More than four take turns."""
    merge: float = 0.0
    """Of the second kernel, where sequences are split."""
    merge_split: float = 0.0
    """Of that kernel for each split."""
    eight_warps: bool = False
    """Whether a CTA may have eight warps: twice the bytes in flight without a second kernel."""
    shortest_split: int = 256
    """Tokens of a split, at least."""
    stages_alone: int = 2
    """Tiles that a warp has in flight or in work where its CTA has an SM for itself."""

    def stages(self, ctas: int, processors: int) -> int:
        """Tiles that each warp of a launch of `ctas` CTAs has in flight or in work."""
        return self.stages_alone if ctas <= processors else 2


_COSTS = {
    "H200": DecodeCosts(
        (0.0, 1.85, 2.45, 3.2), 1000.0, 16.0, eight_warps=True, shortest_split=128, stages_alone=4
    )
}
"""Of heads of 128 channels with at most 8 query rows each, by a word of the GPU's name."""
_DEFAULT_COSTS = DecodeCosts()
"""Of all others, after measurements on an H100: there two CTAs draw the share of an SM."""
_CTA_START = 128
"""Cost of a CTA besides its tokens."""


class _Parameters(ctypes.Structure):
    _fields_ = [
        ("q", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("partial", ctypes.c_void_p),
        ("stats", ctypes.c_void_p),
        ("storage", ctypes.c_void_p),
        ("tables", ctypes.c_void_p),
        ("starts", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        ("table_stride", ctypes.c_int64),
        ("q_stride", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("splits", ctypes.c_int32),
        ("row_chunks", ctypes.c_int32),
        ("score_scale", ctypes.c_float),
        ("softcap_log2e", ctypes.c_float),
        ("window", ctypes.c_int32),
        # Last, as in decode.cu: a variant without sinks takes the struct without it.
        ("sinks", ctypes.c_void_p),
    ]


def default_config(
    head_dim: int, row_tiles: int, capability: tuple[int, int], warps: int = 4, stages: int = 2
) -> DecodeConfig:
    """The fastest variant measured for a head shape, of CTAs of four or eight warps."""
    whole = head_dim % 32 == 0  # rows of 16 n bytes; others take shorter copies and more registers
    min_ctas = 2 if head_dim * row_tiles > 128 else 4 if whole else 3
    bulk = whole and capability >= (9, 0)
    # Tokens of 64 channels are so short that the bookkeeping of a tile of 32 counts.
    tile = 64 if bulk and head_dim * row_tiles == 64 else 32
    return DecodeConfig(warps, tile, stages, min_ctas=min_ctas * 4 // warps, bulk=bulk)


def decode_cuda(
    q: Tensor,
    out: Tensor,
    pages: KVPages,
    batch: Sequences,
    options: AttentionOptions,
    config: DecodeConfig | None = None,
) -> None:
    """See `attention`: a few new tokens of each sequence over INT4 pages."""
    tokens, num_heads, head_dim = q.shape
    num_kv_heads = pages.num_kv_heads
    rows = batch.max_seqlen_q * (num_heads // num_kv_heads)
    row_tiles = 2 if rows > 8 and head_dim <= 128 else 1  # two of 256 channels spill registers
    row_chunks = -(-rows // (8 * row_tiles))
    ctas = batch.seq_lens.shape[0] * row_chunks * num_kv_heads
    device = q.device.index
    warps, splits = 4, options.num_splits
    costs = decode_costs(device_name(device), head_dim, row_tiles)
    if not splits:
        length = seen_tokens(batch, options)
        warps, splits = choose_cut(ctas, length, multiprocessors(device), costs)
    stages = costs.stages(ctas * splits, multiprocessors(device))
    capability = device_capability(device)
    config = config or default_config(head_dim, row_tiles, capability, warps, stages)
    softcap, sinks = options.logit_softcap, options.sinks
    decode, merge = _kernels(
        device,
        config,
        head_dim,
        pages.block_size,
        row_tiles,
        q.dtype is torch.bfloat16,
        softcap is not None,
        options.sliding_window is not None,
        sinks is not None,
        options.settled and config.bulk,
        config.bulk and row_chunks == 1,
    )
    partial = stats = out
    if splits > 1:
        partial = q.new_empty((tokens, num_heads, splits, head_dim), dtype=torch.float32)
        stats = q.new_empty((tokens, num_heads, splits, 2), dtype=torch.float32)
    parameters = _Parameters(
        q=q.data_ptr(),
        out=out.data_ptr(),
        partial=partial.data_ptr(),
        stats=stats.data_ptr(),
        storage=pages.storage.data_ptr(),
        tables=batch.block_tables.data_ptr(),
        starts=batch.cu_seqlens_q.data_ptr(),
        lengths=batch.seq_lens.data_ptr(),
        table_stride=batch.block_tables.stride(0),
        q_stride=q.stride(0),
        num_kv_heads=num_kv_heads,
        group=num_heads // num_kv_heads,
        splits=splits,
        row_chunks=row_chunks,
        score_scale=options.softmax_scale * (_LOG2E if softcap is None else 1.0 / softcap),
        softcap_log2e=0.0 if softcap is None else softcap * _LOG2E,
        window=options.sliding_window or 0,
        sinks=None if sinks is None else sinks.data_ptr(),
    )
    decode.launch(ctas * splits, parameters, overlap=config.bulk)
    if splits > 1:
        merge.launch(tokens * num_heads, parameters, overlap=config.bulk)


@cache
def decode_costs(gpu: str, head_dim: int, row_tiles: int) -> DecodeCosts:
    """Costs on the GPU whose driver calls it `gpu`, for a head shape."""
    known = next((_COSTS[word] for word in gpu.split() if word in _COSTS), _DEFAULT_COSTS)
    return known if (head_dim, row_tiles) == (128, 1) else _DEFAULT_COSTS


@lru_cache(maxsize=4096)
def choose_cut(
    ctas: int, length: int, processors: int, costs: DecodeCosts = _DEFAULT_COSTS
) -> tuple[int, int]:
    """Warps of a CTA and splits of a sequence that cost the busiest multiprocessor least.

    Args:
        ctas: CTAs of unsplit sequences.
        length: cached tokens of a sequence.
        processors: multiprocessors of the GPU.
        costs: of that GPU.
    """
    most = max(1, min(64, length // costs.shortest_split))

    def cost(splits: int) -> float:
        rounds, rest = divmod(-(-ctas * splits // processors), 4)
        merge = costs.merge + costs.merge_split * splits if splits > 1 else 0.0
        return (4 * rounds + costs.shares[rest]) * (length / splits + _CTA_START) + merge

    splits = min(range(1, most + 1), key=cost)
    if costs.eight_warps and processors <= 2 * ctas <= 4 * processors:
        # One or two CTAs of eight warps work as twice as many of four, each for half the tokens.
        share = costs.shares[2] if ctas <= processors else 4.0
        if share * (length / 2 + _CTA_START) < cost(splits):
            return 8, 1
    return 4, splits


def compile_decode(
    arch: str,
    config: DecodeConfig,
    head_dim: int,
    block_size: int,
    row_tiles: int,
    *,
    bf16: bool,
    softcap: bool,
    window: bool,
    sinks: bool,
    settled: bool = False,
    stream: bool = False,
) -> bytes:
    """The cubin of one variant for `arch` ("sm_90"); needs NVRTC but no GPU."""
    defines = {
        "HEAD_DIM": head_dim,
        "BLOCK_SIZE": block_size,
        "NT": row_tiles,
        "WARPS": config.warps,
        "TILE": config.tile,
        "STAGES": config.stages,
        "MIN_CTAS": config.min_ctas,
        "BULK": int(config.bulk),
        "BF16": int(bf16),
        "SOFTCAP": int(softcap),
        "WINDOW": int(window),
        "SINKS": int(sinks),
        "SETTLED": int(settled),
        "STREAM": int(stream),
    }
    source = read_source("quatom.ops.attention", "decode.cu")
    return compile_cubin(source, arch, defines)


@cache
def _kernels(
    device: int,
    config: DecodeConfig,
    head_dim: int,
    block_size: int,
    row_tiles: int,
    bf16: bool,
    softcap: bool,
    window: bool,
    sinks: bool,
    settled: bool,
    stream: bool,
) -> tuple[CudaKernel, CudaKernel]:
    """The decode and merge kernels of one variant, compiled and loaded on `device`."""
    major, minor = device_capability(device)
    cubin = compile_decode(
        f"sm_{major}{minor}",
        config,
        head_dim,
        block_size,
        row_tiles,
        bf16=bf16,
        softcap=softcap,
        window=window,
        sinks=sinks,
        settled=settled,
        stream=stream,
    )
    with torch.cuda.device(device):
        shared_bytes = config.shared_bytes(head_dim, row_tiles)
        decode = load_kernel(cubin, "decode", threads=32 * config.warps, shared_bytes=shared_bytes)
        return decode, load_kernel(cubin, "merge", threads=128)
