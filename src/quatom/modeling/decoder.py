"""A whole decoder: embedding, blocks, final norm and output head."""

from collections.abc import Sequence
from functools import cache, partial
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from quatom.families.spec import ModelConfig
from quatom.modeling.block import DecoderBlock
from quatom.modeling.context import ForwardContext, Stages, Stop, advance
from quatom.modeling.inputs import NormLayer
from quatom.modeling.rotary import RotaryTables
from quatom.modeling.weights import NormWeights
from quatom.numerics.kv_pages import KVDtype, KVPages
from quatom.ops.backend import Backend
from quatom.ops.experts import ExpertSum, summed
from quatom.plan import LayerPlan

FEW_ROWS = 64
"""Rows up to which a CPU multiplies the head from the left."""


class Decoder(nn.Module):
    """A decoder of any family."""

    head_bias: Tensor | None

    def __init__(
        self,
        config: ModelConfig,
        *,
        embedding: Tensor,  # (vocab, hidden)
        blocks: Sequence[DecoderBlock],
        final_norm: NormWeights,
        head: Tensor | None,  # (vocab, hidden); None: tied to the embedding
        positions: Tensor | None = None,  # (rows, hidden), where config.positions
        head_bias: Tensor | None = None,  # (vocab,), where config.head_bias
        backend: Backend | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.embed = TokenEmbedding(config, embedding, positions)
        self.blocks = nn.ModuleList(blocks)
        self.final_norm = NormLayer(config.final_norm, final_norm, backend)
        self.blocks_run = 0
        self.head = None if head is None else nn.Parameter(head, requires_grad=False)
        self.register_buffer("head_bias", head_bias, persistent=False)
        self.rotary = RotaryTables(config, config.max_position, embedding.device)
        self._goes_beyond = self._beyond_training(config.max_position)

    @property
    def embedding(self) -> Tensor:
        """Token embedding, (vocab, hidden)."""
        return self.embed.table

    def limit_length(self, max_length: int) -> None:
        """Say how many tokens the longest sequence will have: tables depend on it.

        longrope has other frequencies beyond the pre-training length, for all tokens. Queries that
        grow with their position do so beyond a length; below it nothing is multiplied.
        """
        beyond = self._beyond_training(max_length)
        if beyond != self._goes_beyond:
            self._goes_beyond = beyond
            config, device = self.config, self.embedding.device
            self.rotary = RotaryTables(config, config.max_position, device, max_length=max_length)

    def _beyond_training(self, length: int) -> list[bool]:
        """Whether `length` exceeds each length at which tables become other ones."""
        scalings = [rope.scaling for rope in self.config.ropes()]
        lengths = [
            scaling.original_max_position or 0
            for scaling in scalings
            if scaling is not None and scaling.kind == "longrope"
        ]
        growths = [layer.attention.query_growth for layer in self.config.layers]
        lengths += [growth.length for growth in dict.fromkeys(growths) if growth is not None]
        return [length > end for end in lengths]

    def forward(
        self,
        input_ids: Tensor,  # (T,) int64
        context: ForwardContext,
        kv_cache: Sequence[KVPages],
        rows: Tensor | None = None,  # (M,) int64
    ) -> Tensor:
        """Hidden states after the final norm. Appends to the KV cache.

        Args:
            input_ids: new tokens.
            context: where they are in their sequences and in the cache.
            kv_cache: pages of every layer.
            rows: tokens whose hidden states are needed; None: all. What follows the last attention
                runs for them alone.

        Returns:
            (M, hidden), or (T, hidden) of all tokens.
        """
        stages = self.stages(input_ids, context, kv_cache)
        stop, last = advance(stages, None)
        while not last:
            stop, last = advance(stages, stop.attention(stop.q, context))
        if rows is None:
            return self.finish(stop.attention(stop.q, context), stop.residual)
        if not rows.numel():
            return stop.residual[:0]
        return self.finish(stop.attention(stop.q, context)[rows], stop.residual[rows])

    def stages(
        self,
        input_ids: Tensor,  # (T,) int64
        context: ForwardContext,
        kv_cache: Sequence[KVPages],
    ) -> Stages:
        """A forward pass that stops for each attention; `finish` is what follows the last one.

        What runs between two stops has shapes that T alone decides, and of the context it reads
        positions and slot_mapping: it can be captured in a CUDA graph for any batch of T tokens.
        """
        layers = list(zip(self.blocks, kv_cache, strict=True))
        stop = self._stop(*layers[0], self.embed(input_ids, context.positions), None, context)
        for (module, _), layer in pairwise(layers):
            attended = yield stop
            block = cast("DecoderBlock", module)
            stop = self._stop(*layer, *block.after_attention(attended, stop.residual), context)
        return stop

    def _stop(
        self,
        module: nn.Module,
        kv: KVPages,
        hidden: Tensor | ExpertSum,
        residual: Tensor | None,
        context: ForwardContext,
    ) -> Stop:
        """Run a block until its attention."""
        self.blocks_run += 1
        block = cast("DecoderBlock", module)
        q, residual = block.before_attention(hidden, residual, context, kv, self.rotary)
        return Stop(partial(block.attend, kv=kv, rotary=self.rotary), q, residual)

    def finish(
        self,
        attended: Tensor,  # (M, H, D)
        residual: Tensor,  # (M, hidden)
    ) -> Tensor:
        """Hidden states after the final norm, (M, hidden), of some rows of the last stop."""
        hidden, residual = cast("DecoderBlock", self.blocks[-1]).after_attention(attended, residual)
        final: Tensor = self.final_norm(summed(hidden), residual)[0]
        return final

    def compute_logits(self, hidden: Tensor) -> Tensor:  # (M, hidden) -> (M, vocab) float32
        """Scores of the next token."""
        return self.head_logits(hidden).float()

    def head_logits(self, hidden: Tensor) -> Tensor:  # (M, hidden) -> (M, vocab)
        """`compute_logits`, in 16 bits where they are the head's products as those were rounded."""
        head = self.embedding if self.head is None else self.head
        if hidden.device.type == "cpu" and hidden.shape[0] <= FEW_ROWS:
            # As the left operand a head of many rows is read once, at the speed of memory.
            logits = (head @ hidden.t()).t().contiguous()
        else:
            logits = nn.functional.linear(hidden, head)
        if self.head_bias is not None:
            logits = logits.float() + self.head_bias
        return scale_logits(self.config, logits)

    def allocate_kv_cache(self, num_blocks: int, block_size: int) -> list[KVPages]:
        """Empty pages for every layer, in the recipe's format, on the model's device."""
        return [
            allocate_pages(cast("DecoderBlock", block).plan, num_blocks, block_size, self.embedding)
            for block in self.blocks
        ]


class TokenEmbedding(nn.Module):
    """What enters the first block."""

    positions: Tensor | None

    def __init__(self, config: ModelConfig, table: Tensor, positions: Tensor | None) -> None:
        super().__init__()
        self.config = config
        self.table = nn.Parameter(table, requires_grad=False)
        self.register_buffer("positions", positions, persistent=False)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:  # (T,) and (T,) int64
        """Hidden states, (T, hidden)."""
        tokens = nn.functional.embedding(input_ids, self.table)
        return finish_embedding(self.config, tokens, self.positions, positions)


def finish_embedding(
    config: ModelConfig,
    tokens: Tensor,  # (..., hidden) rows of the embedding matrix
    table: Tensor | None,  # (rows, hidden) learned embedding of positions, where there is one
    positions: Tensor,  # (...) int64
) -> Tensor:
    """Hidden states from the rows of the embedding matrix: scaled, positions added."""
    if config.embedding_multiplier != 1.0:
        tokens = tokens * _rounded(config.embedding_multiplier, tokens.dtype)
    if table is not None:
        assert config.positions is not None
        tokens = tokens + nn.functional.embedding(positions + config.positions.offset, table)
    return tokens


@cache
def _rounded(value: float, dtype: torch.dtype) -> float:
    """The nearest number of a dtype; no tensor, whose copy a CUDA graph could not capture."""
    return torch.tensor(value, dtype=dtype).item()


def scale_logits(config: ModelConfig, logits: Tensor) -> Tensor:  # (M, vocab)
    """Logits divided and soft-capped in float32, as the model says; else they are as they were.

    May reuse the memory of `logits`.
    """
    if config.logits_divisor != 1.0:
        logits = logits.float().div_(config.logits_divisor)
    if config.logit_softcap is not None:
        logits = logits.float().div_(config.logit_softcap).tanh_().mul_(config.logit_softcap)
    return logits


def allocate_pages(layer: LayerPlan, num_blocks: int, block_size: int, like: Tensor) -> KVPages:
    """Empty pages of one layer; an unquantized cache takes the dtype of `like`."""
    attention, spec = layer.spec.attention, layer.kv_cache
    dtype: KVDtype = _FLOAT_CACHES[like.dtype] if spec.format == "float16" else spec.format
    return KVPages.allocate(
        num_blocks, block_size, attention.num_kv_heads, attention.head_dim, dtype, like.device
    )


_FLOAT_CACHES: dict[torch.dtype, KVDtype] = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
}
