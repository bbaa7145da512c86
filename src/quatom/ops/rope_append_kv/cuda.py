"""CUDA kernel for `rope_append_kv` on Hopper: what it can do, and its launch. See append.cu."""

import ctypes
from functools import cache

import torch
from torch import Tensor

from quatom.families.spec import Norm
from quatom.numerics.hadamard import hadamard_block
from quatom.numerics.kv_pages import KVPages
from quatom.ops.cuda_build import (
    CudaKernel,
    compile_cubin,
    device_capability,
    load_kernel,
    read_source,
)
from quatom.ops.head_norm import HeadNorms

_THREADS = 128
_WIDE_FROM = 64
"""With this many tokens or more in a batch, a lane takes twice 8 channels instead of twice 4."""


class _Parameters(ctypes.Structure):
    _fields_ = [
        ("q", ctypes.c_void_p),
        ("k", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("rotated", ctypes.c_void_p),
        ("storage", ctypes.c_void_p),
        ("key_offset", ctypes.c_void_p),
        ("q_weight", ctypes.c_void_p),
        ("k_weight", ctypes.c_void_p),
        ("q_token_stride", ctypes.c_int64),
        ("k_token_stride", ctypes.c_int64),
        ("v_token_stride", ctypes.c_int64),
        ("q_head_stride", ctypes.c_int32),
        ("k_head_stride", ctypes.c_int32),
        ("v_head_stride", ctypes.c_int32),
        ("tokens", ctypes.c_int32),
        ("heads", ctypes.c_int32),
        ("kv_heads", ctypes.c_int32),
        ("margin", ctypes.c_float),
        ("norm", ctypes.c_float),
        ("eps", ctypes.c_float),
    ]


def cuda_obstacle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    pages: KVPages,
    key_offset: Tensor | None,
) -> str | None:
    """Why append.cu cannot run this call, or None if it can."""
    if q.device.type != "cuda":
        return f"the tensors are on {q.device}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"it reads float16 and bfloat16, not {q.dtype}"
    if pages.dtype == "float32":
        return "it writes int4, int8, float16 and bfloat16 caches, not float32"
    if pages.head_dim % 16:
        return f"a lane takes 8 channels of half a head, these heads have {pages.head_dim}"
    if (capability := device_capability(q.device.index))[0] != 9:
        return f"it needs compute capability 9.x, this device has {capability}"
    if cos.dtype is not torch.float32 or not (cos.is_contiguous() and sin.is_contiguous()):
        return f"it reads contiguous float32 cos and sin, got {cos.dtype}"
    if key_offset is not None and not key_offset.is_contiguous():
        return f"it reads a contiguous key_offset, got strides {key_offset.stride()}"
    for name, x in (("positions", positions), ("slot_mapping", slot_mapping)):
        if x.dtype is not torch.int64 or not x.is_contiguous():
            return f"it reads contiguous int64 {name}, got {x.dtype} with strides {x.stride()}"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(0) % 8 or x.stride(1) % 8 or x.data_ptr() % 16:
            return f"it loads 8 channels at once, strides of {name} are {x.stride()}"
    return None


def normalizes(norms: HeadNorms, q: Tensor) -> bool:
    """Whether append.cu normalizes q and k as asked, each head by the lanes that hold it."""
    norm, weights = norms.norm, (norms.q_weight, norms.k_weight)
    return (
        norms.axis == "head"
        and norm.kind == "rms"
        and norm.weight_offset in (0.0, 1.0)
        and all(w.dtype is q.dtype and w.is_contiguous() for w in weights)
        and not any(w.data_ptr() % 16 for w in weights)
    )


@cache
def _kernel(constants: tuple[tuple[str, int], ...], device: int) -> CudaKernel:
    source = read_source("quatom.ops.rope_append_kv", "append.cu")
    cubin = compile_cubin(source, "sm_90a", dict(constants))
    with torch.cuda.device(device):
        return load_kernel(cubin, "rope_append_kv", threads=_THREADS)


def defines(
    pages: KVPages,
    dtype: torch.dtype,
    width: int,
    *,
    rotate_keys: bool,
    hadamard: bool,
    norm: Norm | None = None,
    settled: bool = False,
) -> dict[str, int]:
    """The constants that append.cu is compiled with."""
    return {
        "N": width,
        "HEAD_DIM": pages.head_dim,
        "BLOCK_SIZE": pages.block_size,
        "BITS": pages.bits,
        "INPUT_BF16": int(dtype is torch.bfloat16),
        "CACHE_BF16": int(pages.dtype == "bfloat16"),
        "ROTATE_KEYS": int(rotate_keys),
        "HADAMARD": int(hadamard),
        "NORMED": int(norm is not None),
        "WEIGHT_OFFSET": 0 if norm is None else int(norm.weight_offset),
        "SETTLED": int(settled),
    }


def rope_append_kv_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    pages: KVPages,
    rotated: Tensor,
    rotate_keys_in_cache: bool,
    rotate_kv: bool,
    clip_ratio: float,
    key_offset: Tensor | None,
    settled: bool,
    norms: HeadNorms | None,
) -> None:
    """See `rope_append_kv`; writes q into `rotated`. A call that has no `cuda_obstacle`."""
    tokens, heads, head_dim = q.shape
    if not tokens:
        return
    width = 8 if tokens >= _WIDE_FROM else 4
    constants = defines(
        pages,
        q.dtype,
        width,
        rotate_keys=rotate_keys_in_cache,
        hadamard=rotate_kv,
        norm=None if norms is None else norms.norm,
        settled=settled,
    )
    kernel = _kernel(tuple(constants.items()), q.device.index)
    kv_heads = pages.num_kv_heads
    parameters = _Parameters(
        q=q.data_ptr(),
        k=k.data_ptr(),
        v=v.data_ptr(),
        cos=cos.data_ptr(),
        sin=sin.data_ptr(),
        positions=positions.data_ptr(),
        slots=slot_mapping.data_ptr(),
        rotated=rotated.data_ptr(),
        storage=pages.storage.data_ptr(),
        key_offset=None if key_offset is None else key_offset.data_ptr(),
        q_weight=None if norms is None else norms.q_weight.data_ptr(),
        k_weight=None if norms is None else norms.k_weight.data_ptr(),
        q_token_stride=q.stride(0),
        k_token_stride=k.stride(0),
        v_token_stride=v.stride(0),
        q_head_stride=q.stride(1),
        k_head_stride=k.stride(1),
        v_head_stride=v.stride(1),
        tokens=tokens,
        heads=heads,
        kv_heads=kv_heads,
        margin=0.5 * (1.0 - clip_ratio),
        norm=hadamard_block(head_dim) ** -0.5,
        eps=0.0 if norms is None else norms.norm.eps,
    )
    lanes = 1 << (head_dim // (2 * width) - 1).bit_length()
    ctas = -(-tokens * (heads + 2 * kv_heads) * lanes // _THREADS)
    kernel.launch(ctas, parameters, overlap=True)
