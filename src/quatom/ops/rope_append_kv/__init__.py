"""Fused norm of heads -> rotary embedding -> KV quantization -> append to the paged cache."""

import torch
from torch import Tensor

from quatom.errors import BackendError, ShapeError
from quatom.numerics.kv_pages import KVPages
from quatom.ops.backend import Backend, choose_backend
from quatom.ops.head_norm import HeadNorms, check_head_norm, head_norm
from quatom.ops.rope_append_kv.cuda import cuda_obstacle, normalizes
from quatom.ops.shared import Shared

BACKENDS = (Backend.REFERENCE, Backend.TRITON, Backend.CUDA)


def rope_append_kv(
    q: Tensor,  # (T, H, D) last axis contiguous; usually a view of the fused qkv output
    k: Tensor,  # (T, KV, D) same dtype as q, last axis contiguous
    v: Tensor,  # (T, KV, D) same dtype as q, last axis contiguous
    cos: Tensor,  # (max_position, D / 2) float32
    sin: Tensor,  # (max_position, D / 2) float32
    positions: Tensor,  # (T,) int64, below max_position
    slot_mapping: Tensor,  # (T,) int64: block * S + offset in pages, or -1: not stored
    pages: KVPages,  # written in place
    *,
    norms: HeadNorms | None = None,
    rotate_keys_in_cache: bool = True,
    rotate_kv: bool = False,
    clip_ratio: float = 1.0,
    key_offset: Tensor | None = None,  # (KV, D) float32, contiguous
    shared: Shared | None = None,
    settled: bool = False,
    backend: Backend | None = None,
) -> Tensor:
    """Rotate q and k by their positions and store k and v in their cache slots.

    Where there are norms, q and k are normalized first, as `head_norm` does.
    Channels j and j + D / 2 of a head form a pair that turns by the angle of its position (the
    neox convention of Hugging Face models):

        x'[j] = x[j] cos - x[j + D/2] sin,    x'[j + D/2] = x[j + D/2] cos + x[j] sin

    in float32; K is quantized from those float32 values, q is rounded to its own dtype. Triton
    agrees with the reference to one code on at most one value in a thousand: multiply-add
    contraction may move a value across a rounding boundary. CUDA rounds as the reference does, but
    for the sum of squares of a norm, which it adds up in another order.

    Args:
        norms: of q and k before rotary embedding.
        rotate_keys_in_cache: True stores K after rotary embedding, which `attention` reads fastest.
            False stores K as it comes, as the original Atom does: pass `rotary` to `attention`.
        rotate_kv: multiply q and k of each head, after rotary embedding, by the Hadamard matrix
            H / sqrt(D), or by its block form (`quatom.numerics.hadamard.rotate_heads`) where D is
            no power of two. Scores stay the same, K's outlier channels spread over the head.
        clip_ratio: fraction of a token's range that the codes cover.
        key_offset: subtracted from K after rotary embedding, before `rotate_kv`. It takes the same
            from every score of a query, which softmax does not see.
        shared: what the layers of one batch share; only the reference uses it.
        settled: no kernel that may still run writes positions or slot_mapping, as where they are
            inputs of a model's step: they are then read while the last kernel runs, and decode
            attention after this call may read older tokens of the cache meanwhile.
        backend: implementation to run; None picks the fastest one for q's device.

    Returns:
        Rotated q, (T, H, D) contiguous, in q's dtype.

    Raises:
        ShapeError: shapes disagree, or `rotate_kv` is asked for unrotated keys.
        BackendError: the backend asked for cannot run this call.

    Source: Atom (Zhao et al., MLSys 2024), KV-cache quantization; QuaRot (Ashkboos et al., NeurIPS
    2024) for rotating q and k.
    """
    tokens, _, head_dim = q.shape
    if k.shape != (tokens, pages.num_kv_heads, pages.head_dim) or v.shape != k.shape:
        raise ShapeError(
            f"pages hold {pages.num_kv_heads} KV heads of {pages.head_dim} channels: expected k "
            f"and v ({tokens}, {pages.num_kv_heads}, {pages.head_dim}), got {tuple(k.shape)} and "
            f"{tuple(v.shape)}"
        )
    if head_dim != pages.head_dim or cos.shape != sin.shape or cos.shape[-1] * 2 != head_dim:
        raise ShapeError(
            f"q has {head_dim} channels per head, the cache {pages.head_dim}, and cos, sin "
            f"{tuple(cos.shape)}, {tuple(sin.shape)} must be (max_position, {pages.head_dim // 2})"
        )
    if positions.shape != (tokens,) or slot_mapping.shape != (tokens,):
        raise ShapeError(
            f"{tokens} tokens need as many positions and slots, got {tuple(positions.shape)} and "
            f"{tuple(slot_mapping.shape)}"
        )
    if rotate_kv and not rotate_keys_in_cache:
        raise ShapeError("rotate_kv turns K after rotary embedding: it needs rotate_keys_in_cache")
    if key_offset is not None:
        if not rotate_keys_in_cache:
            raise ShapeError("key_offset is taken from rotated K: it needs rotate_keys_in_cache")
        if key_offset.shape != k.shape[1:] or key_offset.dtype != torch.float32:
            raise ShapeError(
                f"key_offset must be {tuple(k.shape[1:])} float32, got {tuple(key_offset.shape)} "
                f"{key_offset.dtype}"
            )
    obstacle = cuda_obstacle(q, k, v, cos, sin, positions, slot_mapping, pages, key_offset)
    available = BACKENDS if obstacle is None else BACKENDS[:-1]
    if backend is Backend.CUDA and obstacle is not None:
        raise BackendError(
            f"rope_append_kv cannot run on backend cuda: {obstacle}; use backend triton"
        )
    chosen = choose_backend("rope_append_kv", available, q.device, backend)
    if norms is not None:
        check_head_norm(q, k, norms)
        if chosen is not Backend.CUDA or not normalizes(norms, q):
            q, k = head_norm(q, k, norms, backend=None if chosen is Backend.CUDA else chosen)
            norms = None
    rotated = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    arguments = (
        q,
        k,
        v,
        cos,
        sin,
        positions,
        slot_mapping,
        pages,
        rotated,
        rotate_keys_in_cache,
        rotate_kv,
        clip_ratio,
        key_offset,
    )
    match chosen:
        case Backend.CUDA:
            from quatom.ops.rope_append_kv.cuda import rope_append_kv_cuda

            rope_append_kv_cuda(*arguments, settled, norms)
        case Backend.TRITON:
            from quatom.ops.rope_append_kv.triton import rope_append_kv_triton

            rope_append_kv_triton(*arguments)
        case _:
            from quatom.ops.rope_append_kv.reference import rope_append_kv_reference

            rope_append_kv_reference(*arguments, shared)
    return rotated
