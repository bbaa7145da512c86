"""The decoder of Llama and Qwen2, floating-point and quantized alike.

One block, for T packed tokens of any number of sequences:

    hidden, residual -> norm -> q, k, v -> rotate, append to the KV cache, attend -> o
                     -> norm -> gate, up -> silu(gate) * up -> down

What differs between recipes is which `Linear` and which `InputQuantizer` a block holds, and the
format of the KV cache. Nothing here asks for the precision.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quatom.modeling.config import ModelConfig
from quatom.modeling.context import ForwardContext
from quatom.modeling.inputs import InputQuantizer
from quatom.modeling.rope import rotary_table
from quatom.numerics.kv_pages import KVDtype, KVPages
from quatom.ops.attention import attention
from quatom.ops.backend import Backend
from quatom.ops.rmsnorm import rmsnorm
from quatom.ops.rope_append_kv import rope_append_kv
from quatom.recipe import KVSpec

FEW_ROWS = 64
"""Rows up to which a CPU multiplies the head from the left."""


@dataclass(frozen=True, slots=True)
class BlockInputs:
    """The four places of a block where a linear's input is made."""

    qkv: InputQuantizer
    o: InputQuantizer
    gate_up: InputQuantizer
    down: InputQuantizer


class DecoderBlock(nn.Module):
    """Attention and MLP with their norms."""

    key_offset: Tensor | None

    def __init__(
        self,
        config: ModelConfig,
        kv_spec: KVSpec,
        *,
        input_norm: Tensor,  # (hidden,)
        post_norm: Tensor,  # (hidden,)
        qkv: nn.Module,  # (H + 2 KV) * D rows: q, then k, then v
        o: nn.Module,
        gate_up: nn.Module,  # 2 * intermediate rows: gate, then up
        down: nn.Module,
        inputs: BlockInputs,
        key_offset: Tensor | None = None,  # (KV, D) float32, where kv_spec has one
        backend: Backend | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.kv_spec = kv_spec
        self.backend = backend
        self.input_norm = nn.Parameter(input_norm, requires_grad=False)
        self.post_norm = nn.Parameter(post_norm, requires_grad=False)
        self.qkv, self.o, self.gate_up, self.down = qkv, o, gate_up, down
        self.qkv_input, self.o_input = inputs.qkv, inputs.o
        self.gate_up_input, self.down_input = inputs.gate_up, inputs.down
        self.register_buffer("key_offset", key_offset, persistent=False)

    def forward(
        self,
        hidden: Tensor,  # (T, hidden)
        residual: Tensor | None,  # (T, hidden); None in the first block
        context: ForwardContext,
        kv: KVPages,
        rope: tuple[Tensor, Tensor],  # cos and sin, each (positions, D / 2)
    ) -> tuple[Tensor, Tensor]:
        """Returns the block's last output, not yet added, and the residual to add it to."""
        config = self.config
        x, residual = self.qkv_input.norm(hidden, residual, self.input_norm, config.rms_norm_eps)
        q, k, v = (
            self.qkv(x)
            .unflatten(-1, (-1, config.head_dim))
            .split((config.num_heads, config.num_kv_heads, config.num_kv_heads), dim=1)
        )
        rotates_cached = self.kv_spec.keys == "post_rope"
        q = rope_append_kv(
            q,
            k,
            v,
            *rope,
            context.positions,
            context.slot_mapping,
            kv,
            rotate_keys_in_cache=rotates_cached,
            rotate_kv=self.kv_spec.rotation == "hadamard",
            clip_ratio=self.kv_spec.clip_ratio,
            key_offset=self.key_offset,
            shared=context.shared,
            backend=self.backend,
        )
        attended = attention(
            q,
            kv,
            block_tables=context.block_tables,
            cu_seqlens_q=context.cu_seqlens_q,
            seq_lens=context.seq_lens,
            max_seqlen_q=context.max_seqlen_q,
            max_seq_len=context.max_seq_len,
            sliding_window=config.sliding_window,
            rotary=None if rotates_cached else rope,
            num_decodes=context.num_decodes,
            total_kv_tokens=context.total_kv_tokens,
            prefill_cu_seqlens=context.prefill_cu_seqlens,
            shared=context.shared,
            backend=self.backend,
        )
        hidden = self.o(self.o_input.plain(attended.flatten(1)))
        x, residual = self.gate_up_input.norm(hidden, residual, self.post_norm, config.rms_norm_eps)
        hidden = self.down(self.down_input.silu_mul(self.gate_up(x)))
        return hidden, residual


class Decoder(nn.Module):
    """Embedding, blocks, final norm and output head."""

    def __init__(
        self,
        config: ModelConfig,
        kv_spec: KVSpec,
        *,
        embedding: Tensor,  # (vocab, hidden)
        blocks: Sequence[DecoderBlock],
        final_norm: Tensor,  # (hidden,)
        head: Tensor | None,  # (vocab, hidden); None: tied to the embedding
        backend: Backend | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.kv_spec = kv_spec
        self.backend = backend
        self.embedding = nn.Parameter(embedding, requires_grad=False)
        self.blocks = nn.ModuleList(blocks)
        self.final_norm = nn.Parameter(final_norm, requires_grad=False)
        self.head = None if head is None else nn.Parameter(head, requires_grad=False)
        cos, sin = rotary_table(config, config.max_position, embedding.device)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(
        self,
        input_ids: Tensor,  # (T,) int64
        context: ForwardContext,
        kv_cache: Sequence[KVPages],
    ) -> Tensor:
        """Hidden states after the final norm, (T, hidden). Appends to the KV cache."""
        hidden = nn.functional.embedding(input_ids, self.embedding)
        residual: Tensor | None = None
        for block, kv in zip(self.blocks, kv_cache, strict=True):
            hidden, residual = block(hidden, residual, context, kv, (self.cos, self.sin))
        eps = self.config.rms_norm_eps
        return rmsnorm(hidden, self.final_norm, eps=eps, residual=residual, backend=self.backend)[0]

    def compute_logits(self, hidden: Tensor) -> Tensor:  # (M, hidden) -> (M, vocab) float32
        """Scores of the next token."""
        head = self.embedding if self.head is None else self.head
        if hidden.device.type == "cpu" and hidden.shape[0] <= FEW_ROWS:
            # As the left operand a head of many rows is read once, at the speed of memory.
            return (head @ hidden.t()).t().contiguous().float()
        return nn.functional.linear(hidden, head).float()

    def allocate_kv_cache(self, num_blocks: int, block_size: int) -> list[KVPages]:
        """Empty pages for every layer, in the recipe's format, on the model's device."""
        return [
            allocate_pages(self.config, self.kv_spec, num_blocks, block_size, like=self.embedding)
            for _ in self.blocks
        ]


def allocate_pages(
    config: ModelConfig, kv_spec: KVSpec, num_blocks: int, block_size: int, like: Tensor
) -> KVPages:
    """Empty pages of one layer; an unquantized cache takes the dtype of `like`."""
    dtype: KVDtype = _FLOAT_CACHES[like.dtype]
    if kv_spec.format != "float16":
        dtype = kv_spec.format
    return KVPages.allocate(
        num_blocks, block_size, config.num_kv_heads, config.head_dim, dtype, like.device
    )


_FLOAT_CACHES: dict[torch.dtype, KVDtype] = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
}


def full_sequences_context(
    num_sequences: int, length: int, block_size: int, device: torch.device
) -> ForwardContext:
    """Context of equally long sequences from position 0, their KV blocks laid out in order."""
    blocks = -(-length // block_size)
    tokens = torch.arange(length, device=device)
    starts = torch.arange(num_sequences, device=device).unsqueeze(1) * blocks * block_size
    return ForwardContext(
        positions=tokens.repeat(num_sequences),
        slot_mapping=(starts + tokens).flatten(),
        block_tables=torch.arange(num_sequences * blocks, dtype=torch.int32, device=device).view(
            num_sequences, blocks
        ),
        cu_seqlens_q=torch.arange(num_sequences + 1, dtype=torch.int32, device=device) * length,
        seq_lens=torch.full((num_sequences,), length, dtype=torch.int32, device=device),
        max_seqlen_q=length,
        max_seq_len=length,
        total_kv_tokens=num_sequences * length,
    )
