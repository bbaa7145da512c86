"""Triton kernels that choose a token's experts, in one launch, from its products or its row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quatom.families.spec import Router
from quatom.ops.experts.router_weight import RouterWeight

_ELEMENTS = 512
"""Products that a program holds which reads them, of as many tokens as they are of."""
_TILE = 16384
"""Numbers of a tile of the router's weight."""
_WAVE = 128
"""Programs that a GPU runs at once, about: more tokens than 16 each are cut into as many."""


@triton.jit
def _choose(
    scores,  # (TOKENS, BLOCK_E) products, -inf where there is no expert
    token,  # (TOKENS, 1)
    expert,  # (1, BLOCK_E)
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
    BLOCK_K: tl.constexpr,
):
    largest = tl.max(scores, 1)[:, None]
    if SIGMOID:
        scores = tl.where(expert < E, 1.0 / (1.0 + tl.exp(-scores)), -float("inf"))
    choice = scores
    if CORRECTED:
        choice += tl.load(correction_ptr + expert, mask=expert < E, other=0.0)
    place = tl.arange(0, BLOCK_K)[None, :]
    ids = tl.zeros((TOKENS, BLOCK_K), dtype=tl.int32)
    chosen = tl.zeros((TOKENS, BLOCK_K), dtype=tl.float32)
    for j in range(K):
        # Two reductions of numbers are a third of the code of one that carries places along.
        # Products that are no numbers must still name an expert that there is.
        best = tl.where(choice == tl.max(choice, 1)[:, None], expert, E - 1)
        best = tl.min(best, 1)[:, None]
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


@triton.jit(do_not_specialize=["T"])  # steps of every length run one variant
def _route_kernel(
    logits_ptr,  # (T, E) float32
    correction_ptr,
    ids_ptr,
    weights_ptr,
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
    _choose(
        scores,
        token,
        expert,
        correction_ptr,
        ids_ptr,
        weights_ptr,
        T,
        SCALE,
        E,
        K,
        SIGMOID,
        NORMALIZED,
        CORRECTED,
        TOKENS,
        BLOCK_K,
    )


@triton.jit(do_not_specialize=["T"])
def _route_rows_kernel(
    x_ptr,  # (T, CHANNELS)
    weight_ptr,  # (PARTS, E, CHANNELS) in x's dtype
    bias_ptr,  # (E,) float32; not read without HAS_BIAS
    correction_ptr,
    ids_ptr,
    weights_ptr,
    T,
    x_row_stride,
    SCALE,
    STEP,  # what a part counts beside the one before it
    CHANNELS: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALIZED: tl.constexpr,
    CORRECTED: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    expert = tl.arange(0, BLOCK_E)[None, :]
    channel = tl.arange(0, BLOCK_C)
    products = tl.zeros((TOKENS, BLOCK_E), dtype=tl.float32)
    for i in tl.static_range(PARTS):  # the smallest part first
        if i > 0:
            products *= STEP
        part_ptr = weight_ptr + (PARTS - 1 - i) * E * CHANNELS
        for first in range(0, CHANNELS, BLOCK_C):
            c = first + channel
            x_mask = (token < T) & (c < CHANNELS)[None, :]
            x = tl.load(x_ptr + token * x_row_stride + c[None, :], mask=x_mask, other=0.0)
            w_mask = (c < CHANNELS)[:, None] & (expert < E)
            w = tl.load(part_ptr + expert * CHANNELS + c[:, None], mask=w_mask, other=0.0)
            products = tl.dot(x, w, products)
    if HAS_BIAS:
        products += tl.load(bias_ptr + expert, mask=expert < E, other=0.0)
    _choose(
        tl.where(expert < E, products, -float("inf")),
        token,
        expert,
        correction_ptr,
        ids_ptr,
        weights_ptr,
        T,
        SCALE,
        E,
        K,
        SIGMOID,
        NORMALIZED,
        CORRECTED,
        TOKENS,
        BLOCK_K,
    )


def route_triton(
    logits: Tensor,  # (T, E) float32
    top_k: int,
    router: Router,
    correction: Tensor | None = None,  # (E,) float32
) -> tuple[Tensor, Tensor]:
    """Experts (T, k) int32 and their weights (T, k) float32: a router of softmax or sigmoid scores.

    Of equal scores the expert of the lower number is chosen. CUDA, or the CPU under
    TRITON_INTERPRET=1.
    """
    tokens, experts = logits.shape
    out = _allocate(logits, tokens, top_k)
    rows = max(1, _ELEMENTS // triton.next_power_of_2(experts))
    if tokens:
        _route_kernel[(triton.cdiv(tokens, rows),)](
            logits.contiguous(),
            logits if correction is None else correction,
            *out,
            tokens,
            router.scale,
            TOKENS=rows,
            num_warps=4,
            **_options(experts, top_k, router, correction),
        )
    return out


def route_rows_triton(
    x: Tensor,  # (T, K) float16 or bfloat16
    weight: RouterWeight,
    top_k: int,
    router: Router,
    bias: Tensor | None = None,  # (E,) float32
    correction: Tensor | None = None,  # (E,) float32
) -> tuple[Tensor, Tensor]:
    """The same from the tokens themselves: products on the matrix units, added up in float32.

    As exact as a product in float32 (`RouterWeight`). CUDA, or the CPU under TRITON_INTERPRET=1.
    """
    tokens, channels = x.shape
    parts, experts, _ = weight.parts.shape
    out = _allocate(x, tokens, top_k)
    if not tokens:
        return out
    if x.stride(1) != 1:
        x = x.contiguous()
    options = _options(experts, top_k, router, correction)
    block_e = max(16, options["BLOCK_E"])  # the narrowest product of a matrix unit
    rows = 16
    if block_e <= 128:
        rows = min(64, max(rows, triton.next_power_of_2(triton.cdiv(tokens, _WAVE))))
    _route_rows_kernel[(triton.cdiv(tokens, rows),)](
        x,
        weight.parts,
        x if bias is None else bias,
        x if correction is None else correction,
        *out,
        tokens,
        x.stride(0),
        router.scale,
        weight.step,
        CHANNELS=channels,
        PARTS=parts,
        HAS_BIAS=bias is not None,
        TOKENS=rows,
        BLOCK_C=max(32, min(128, _TILE // block_e)),
        num_warps=4,
        num_stages=4,
        **options | {"BLOCK_E": block_e},
    )
    return out


def _allocate(like: Tensor, tokens: int, top_k: int) -> tuple[Tensor, Tensor]:
    ids = like.new_empty((tokens, top_k), dtype=torch.int32)
    return ids, like.new_empty((tokens, top_k), dtype=torch.float32)


def _options(
    experts: int, top_k: int, router: Router, correction: Tensor | None
) -> dict[str, int | bool]:
    """What both kernels are compiled with."""
    return {
        "E": experts,
        "K": top_k,
        "SIGMOID": router.scores == "sigmoid",
        "NORMALIZED": router.normalized,
        "CORRECTED": correction is not None,
        "BLOCK_E": triton.next_power_of_2(experts),
        "BLOCK_K": triton.next_power_of_2(top_k),
    }
