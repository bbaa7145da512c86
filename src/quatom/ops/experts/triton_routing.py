"""Triton kernel that chooses the experts of a token, in one launch instead of five to seven."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_ELEMENTS = 512
"""Products that a program holds, of as many tokens as they are of."""


@triton.jit(do_not_specialize=["T"])  # steps of every length run one variant
def _route_kernel(
    logits_ptr,  # (T, E) float32
    correction_ptr,  # (E,) float32; not read without CORRECTED
    ids_ptr,  # (T, K) int32
    weights_ptr,  # (T, K) float32
    T,
    SCALE,
    E: tl.constexpr,
    K: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALIZED: tl.constexpr,
    CORRECTED: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    expert = tl.arange(0, BLOCK_E)[None, :]
    inside = (token < T) & (expert < E)
    scores = tl.load(logits_ptr + token * E + expert, mask=inside, other=-float("inf"))
    largest = tl.max(scores, 1)[:, None]
    if SIGMOID:
        scores = tl.where(expert < E, 1.0 / (1.0 + tl.exp(-scores)), -float("inf"))
    choice = scores
    if CORRECTED:
        choice += tl.load(correction_ptr + expert, mask=expert < E, other=0.0)
    place = tl.arange(0, BLOCK_K)[None, :]
    ids = tl.zeros((TOKENS, BLOCK_K), dtype=tl.int32)
    chosen = tl.zeros((TOKENS, BLOCK_K), dtype=tl.float32)
    for j in tl.static_range(K):
        # Products that are no numbers must still name an expert that there is.
        best = tl.minimum(tl.argmax(choice, 1), E - 1)[:, None]
        score = tl.sum(tl.where(expert == best, scores, 0.0), 1)[:, None]
        if not SIGMOID:
            score = tl.exp(score - largest)
        ids = tl.where(place == j, best, ids)
        chosen = tl.where(place == j, score, chosen)
        choice = tl.where(expert == best, -float("inf"), choice)
    if NORMALIZED and SIGMOID:
        chosen /= tl.sum(chosen, 1)[:, None] + 1e-20
    elif NORMALIZED:
        chosen /= tl.sum(chosen, 1)[:, None]
    elif not SIGMOID:
        chosen /= tl.sum(tl.exp(scores - largest), 1)[:, None]
    at = token * K + place
    mask = (token < T) & (place < K)
    tl.store(ids_ptr + at, ids, mask=mask)
    tl.store(weights_ptr + at, chosen * SCALE, mask=mask)


def route_triton(
    logits: Tensor,  # (T, E) float32
    top_k: int,
    *,
    sigmoid: bool,
    normalized: bool,
    scale: float,
    correction: Tensor | None = None,  # (E,) float32
) -> tuple[Tensor, Tensor]:
    """Experts (T, k) int32 and their weights (T, k) float32: a router of softmax or sigmoid scores.

    Of equal scores the expert of the lower number is chosen. CUDA, or the CPU under
    TRITON_INTERPRET=1.
    """
    tokens, experts = logits.shape
    ids = logits.new_empty((tokens, top_k), dtype=torch.int32)
    weights = logits.new_empty((tokens, top_k))
    block = triton.next_power_of_2(experts)
    rows = max(1, _ELEMENTS // block)
    if tokens:
        _route_kernel[(triton.cdiv(tokens, rows),)](
            logits.contiguous(),
            logits if correction is None else correction,
            ids,
            weights,
            tokens,
            scale,
            E=experts,
            K=top_k,
            SIGMOID=sigmoid,
            NORMALIZED=normalized,
            CORRECTED=correction is not None,
            TOKENS=rows,
            BLOCK_E=block,
            BLOCK_K=triton.next_power_of_2(top_k),
            num_warps=4,
        )
    return ids, weights
