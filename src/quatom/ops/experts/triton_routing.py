"""Triton kernels of the router: products of tokens with its weight, and the choice by them."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quatom.families.spec import Router
from quatom.ops.experts.router_weight import RouterWeight
from quatom.ops.triton_launch import overlaps, wait_for_the_kernel_before

_ELEMENTS = 512
"""Products that a program chooses by, of as many tokens as they are of."""
_TILE = 16384
"""Numbers of a tile of the router's weight."""
_WAVE = 128
"""Programs that a GPU runs at once, about: more tokens than 16 each are cut into as many, and with
fewer tokens several programs share the channels of the same ones."""
_SHARES = 8
"""Most programs that do."""


@triton.jit(do_not_specialize=["T"])  # steps of every length run one variant
def _product_kernel(
    x_ptr,  # (T, CHANNELS)
    weight_ptr,  # (PARTS, E, CHANNELS) in x's dtype
    logits_ptr,  # (SHARES, T, E) float32
    T,
    x_row_stride,
    STEP,  # what a part counts beside the one before it
    CHANNELS: tl.constexpr,
    SHARE: tl.constexpr,  # channels of a program
    PARTS: tl.constexpr,
    E: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
    launch_pdl: tl.constexpr,
):
    wait_for_the_kernel_before(launch_pdl)
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    share = tl.program_id(1)
    expert = tl.arange(0, BLOCK_E)[None, :]
    channel = share * SHARE + tl.arange(0, BLOCK_C)
    products = tl.zeros((TOKENS, BLOCK_E), dtype=tl.float32)
    for i in tl.static_range(PARTS):  # the smallest part first
        if i > 0:
            products *= STEP
        part_ptr = weight_ptr + (PARTS - 1 - i) * E * CHANNELS
        for first in range(0, SHARE, BLOCK_C):
            c = first + channel
            x_mask = (token < T) & (c < CHANNELS)[None, :]
            x = tl.load(x_ptr + token * x_row_stride + c[None, :], mask=x_mask, other=0.0)
            w_mask = (c < CHANNELS)[:, None] & (expert < E)
            w = tl.load(part_ptr + expert * CHANNELS + c[:, None], mask=w_mask, other=0.0)
            products = tl.dot(x, w, products)
    at = logits_ptr + (share * T + token) * E + expert
    tl.store(at, products, mask=(token < T) & (expert < E))


@triton.jit(do_not_specialize=["T"])
def _route_kernel(
    logits_ptr,  # (SHARES, T, E) float32, which are added up
    bias_ptr,  # (E,) float32; not read without HAS_BIAS
    correction_ptr,  # (E,) float32; not read without CORRECTED
    ids_ptr,  # (T, K) int32
    weights_ptr,  # (T, K) float32
    T,
    SCALE,
    SHARES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALIZED: tl.constexpr,
    CORRECTED: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    launch_pdl: tl.constexpr,
):
    wait_for_the_kernel_before(launch_pdl)
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    expert = tl.arange(0, BLOCK_E)[None, :]
    inside = (token < T) & (expert < E)
    scores = tl.load(logits_ptr + token * E + expert, mask=inside, other=-float("inf"))
    for share in tl.static_range(1, SHARES):
        at = logits_ptr + (share * T + token) * E + expert
        scores += tl.load(at, mask=inside, other=0.0)
    if HAS_BIAS:
        scores += tl.load(bias_ptr + expert, mask=expert < E, other=0.0)
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
        score = tl.max(choice, 1)[:, None]
        best = tl.min(tl.where(choice == score, expert, E - 1), 1)[:, None]
        if CORRECTED:
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
    logits: Tensor,  # (T, E) float32, or (S, T, E): S parts of them that are added up
    top_k: int,
    router: Router,
    bias: Tensor | None = None,  # (E,) float32
    correction: Tensor | None = None,  # (E,) float32
) -> tuple[Tensor, Tensor]:
    """Experts (T, k) int32 and their weights (T, k) float32: a router of softmax or sigmoid scores.

    Of equal scores the expert of the lower number is chosen. CUDA, or the CPU under
    TRITON_INTERPRET=1.
    """
    tokens, experts = logits.shape[-2:]
    ids = logits.new_empty((tokens, top_k), dtype=torch.int32)
    weights = logits.new_empty((tokens, top_k))
    rows = max(1, _ELEMENTS // triton.next_power_of_2(experts))
    if tokens:
        _route_kernel[(triton.cdiv(tokens, rows),)](
            logits.contiguous(),
            logits if bias is None else bias,
            logits if correction is None else correction,
            ids,
            weights,
            tokens,
            router.scale,
            SHARES=1 if logits.ndim == 2 else logits.shape[0],
            HAS_BIAS=bias is not None,
            E=experts,
            K=top_k,
            SIGMOID=router.scores == "sigmoid",
            NORMALIZED=router.normalized,
            CORRECTED=correction is not None,
            TOKENS=rows,
            BLOCK_E=triton.next_power_of_2(experts),
            BLOCK_K=triton.next_power_of_2(top_k),
            launch_pdl=overlaps(logits),
            num_warps=4,
        )
    return ids, weights


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
    if x.stride(1) != 1:
        x = x.contiguous()
    block_e = max(16, triton.next_power_of_2(experts))  # the narrowest product of a matrix unit
    block_c = max(32, min(128, _TILE // block_e))
    rows, shares = _cut(tokens, triton.cdiv(channels, block_c), block_e)
    logits = x.new_empty((shares, tokens, experts), dtype=torch.float32)
    if tokens:
        _product_kernel[(triton.cdiv(tokens, rows), shares)](
            x,
            weight.parts,
            logits,
            tokens,
            x.stride(0),
            weight.step,
            CHANNELS=channels,
            SHARE=triton.cdiv(channels, shares * block_c) * block_c,
            PARTS=parts,
            E=experts,
            TOKENS=rows,
            BLOCK_C=block_c,
            BLOCK_E=block_e,
            launch_pdl=overlaps(x),
            num_warps=4,
            num_stages=4,
        )
    return route_triton(logits, top_k, router, bias, correction)


def _cut(tokens: int, blocks: int, block_e: int) -> tuple[int, int]:
    """Tokens of a program, and how many programs share their `blocks` of channels."""
    rows = 16
    if block_e <= 128:
        rows = min(64, max(rows, triton.next_power_of_2(triton.cdiv(tokens, _WAVE))))
    shares = 1
    while 2 * shares <= min(_SHARES, blocks // 2, _WAVE // max(1, triton.cdiv(tokens, rows))):
        shares *= 2
    return rows, shares
