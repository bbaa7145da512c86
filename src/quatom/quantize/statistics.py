"""What calibration measures: scores of input channels, and second moments of inputs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from quatom.loading import FUSED
from quatom.modeling.context import ForwardContext
from quatom.modeling.llama import DecoderBlock, allocate_pages, full_sequences_context
from quatom.ops.activations import MixedTensor

KV_BLOCK_SIZE = 64
"""Tokens of a KV block during calibration; results do not depend on it."""
TOKENS_PER_BATCH = 4096
"""Tokens that run through a block at once: enough to keep matrix products efficient."""


class ChannelScores:
    """Importance of each input channel: mean of x**2 ("second_moment") or of |x| ("abs_mean")."""

    def __init__(self, metric: Literal["second_moment", "abs_mean"]) -> None:
        self.metric = metric
        self.sums: dict[str, Tensor] = {}
        self.tokens = 0

    def add(self, place: str, x: Tensor) -> None:  # (T, K)
        """Accumulate the inputs of one batch."""
        x = x.float()
        scores = (x.square() if self.metric == "second_moment" else x.abs()).sum(dim=0)
        self.sums[place] = scores + self.sums[place] if place in self.sums else scores


class SecondMoments:
    """X^T X of each place's inputs, (K, K) float32."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, place: str, x: Tensor) -> None:  # (T, K)
        """Accumulate the inputs of one batch."""
        x = x.float()
        if place not in self.sums:
            self.sums[place] = x.new_zeros(x.shape[1], x.shape[1])
        self.sums[place].addmm_(x.t(), x)


@contextmanager
def observe(block: DecoderBlock, see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While active, call see(place, input (T, K)) for every linear of the block."""

    def hook(place: str) -> Callable[..., None]:
        def before(_: torch.nn.Module, arguments: tuple[Tensor | MixedTensor]) -> None:
            x = arguments[0]
            see(place, x.dequantize() if isinstance(x, MixedTensor) else x)

        return before

    handles = [getattr(block, place).register_forward_pre_hook(hook(place)) for place in FUSED]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def run_block(
    block: DecoderBlock,
    hidden: Tensor,  # (sequences, length, hidden)
    rope: tuple[Tensor, Tensor],
) -> Tensor:
    """The block's output, residual added, for whole sequences from position 0."""
    out = torch.empty_like(hidden)
    length = hidden.shape[1]
    per_batch = max(1, TOKENS_PER_BATCH // length)
    contexts: dict[int, ForwardContext] = {}
    for start in range(0, hidden.shape[0], per_batch):
        batch = hidden[start : start + per_batch]
        count = batch.shape[0]
        if count not in contexts:
            contexts[count] = full_sequences_context(count, length, KV_BLOCK_SIZE, hidden.device)
        context = contexts[count]
        pages = allocate_pages(
            block.config,
            block.kv_spec,
            context.block_tables.numel(),
            KV_BLOCK_SIZE,
            like=hidden,
        )
        output, residual = block(batch.flatten(0, 1), None, context, pages, rope)
        out[start : start + per_batch] = (output + residual).view_as(batch)
    return out
