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


def default_config(head_dim: int, row_tiles: int, capability: tuple[int, int]) -> DecodeConfig:
    """The fastest variant measured for a head shape."""
    whole = head_dim % 32 == 0  # rows of 16 n bytes; others take shorter copies and more registers
    min_ctas = 2 if head_dim * row_tiles > 128 else 4 if whole else 3
    bulk = whole and capability >= (9, 0)
    return DecodeConfig(warps=4, tile=32, stages=2, min_ctas=min_ctas, bulk=bulk)


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
    splits = options.num_splits or choose_splits(
        ctas, seen_tokens(batch, options), multiprocessors(device)
    )
    softcap, sinks = options.logit_softcap, options.sinks
    if config is None:
        config = default_config(head_dim, row_tiles, device_capability(device))
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


@lru_cache(maxsize=4096)
def choose_splits(ctas: int, length: int, processors: int) -> int:
    """Splits that minimise the work of the busiest multiprocessor.

    A multiprocessor with one CTA cannot draw its full share of bandwidth, so two are counted at
    least; a CTA costs about 128 tokens' time besides its tokens.
    """
    most = max(1, min(64, length // 256))

    def cost(splits: int) -> float:
        busiest = max(-(-ctas * splits // processors), 2)
        return busiest * (length / splits + 128)

    return min(range(1, most + 1), key=cost)


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
    )
    with torch.cuda.device(device):
        shared_bytes = config.shared_bytes(head_dim, row_tiles)
        decode = load_kernel(cubin, "decode", threads=32 * config.warps, shared_bytes=shared_bytes)
        return decode, load_kernel(cubin, "merge", threads=128)
