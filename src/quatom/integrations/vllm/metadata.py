"""What the attention of every layer reads about a batch of vLLM's."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
)

from quatom.ops.shared import Shared


@dataclass(slots=True)
class QuatomMetadata(AttentionMetadata):
    """A batch; `quatom.modeling.context.ForwardContext` says what most fields are."""

    num_tokens: int
    """T: new tokens, those left out that pad a CUDA graph's batch."""
    slot_mapping: Tensor  # (T,) int64
    block_tables: Tensor  # (B, max_blocks) int32
    cu_seqlens_q: Tensor  # (B + 1,) int32
    seq_lens: Tensor  # (B,) int32
    max_seqlen_q: int
    max_seq_len: int
    num_decodes: int
    total_kv_tokens: int | None
    prefill_cu_seqlens: tuple[Tensor, Tensor] | None
    positions: Tensor  # (T,) int64, where K is cached before rotary embedding
    first_positions: Tensor  # (T,) int64 zeros: rows of `no_turn`
    no_turn: tuple[Tensor, Tensor]
    """Cos and sin of no angle, (1, D / 2): vLLM's model has turned q and k already."""
    shared: Shared


class QuatomMetadataBuilder(AttentionMetadataBuilder[QuatomMetadata]):
    """Makes a `QuatomMetadata` of what vLLM knows about a batch."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = (
        AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    )
    reorder_batch_threshold = 1  # decodes come first

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        tokens = vllm_config.scheduler_config.max_num_batched_tokens
        tokens = max(tokens, vllm_config.compilation_config.max_cudagraph_capture_size or 0)
        self.max_length = vllm_config.model_config.max_model_len
        self.turns_keys_back = not vllm_config.quant_config.state.recipe.kv_cache.post_rope
        half = kv_cache_spec.head_size // 2
        # CUDA graphs read these again at every replay: they live as long as the builder.
        self.zeros = torch.zeros(tokens, dtype=torch.int64, device=device)
        self.positions = torch.zeros(tokens, dtype=torch.int64, device=device)
        self.no_turn = (torch.ones(1, half, device=device), torch.zeros(1, half, device=device))

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> QuatomMetadata:
        """Describe a batch."""
        common = common_attn_metadata
        tokens, sequences = common.num_actual_tokens, common.num_reqs
        decodes = sequences
        if common.max_query_len > 1:
            longer = (common.query_start_loc_cpu.diff() != 1).nonzero()
            decodes = int(longer[0]) if len(longer) else sequences
        lengths = common.seq_lens_cpu_upper_bound
        total = prefill = None
        if decodes < sequences and lengths is not None:
            rest = lengths[decodes:sequences]
            total = int(rest.sum())
            sums = torch.cat((rest.new_zeros(1), rest.cumsum(0))).int()
            if self.device.type == "cuda":  # no copy that waits for the steps before this one
                sums = sums.pin_memory()
            prefill = (
                (common.query_start_loc[decodes:] - decodes).int(),
                sums.to(self.device, non_blocking=True),
            )
        positions = self.positions[:tokens]
        if self.turns_keys_back:
            positions.copy_(self._positions(common, tokens))
        return QuatomMetadata(
            num_tokens=tokens,
            slot_mapping=common.slot_mapping[:tokens],
            block_tables=common.block_table_tensor,
            cu_seqlens_q=common.query_start_loc,
            seq_lens=common.seq_lens,
            max_seqlen_q=common.max_query_len,
            max_seq_len=common.max_seq_len,
            num_decodes=decodes,
            total_kv_tokens=total,
            prefill_cu_seqlens=prefill,
            positions=positions,
            first_positions=self.zeros[:tokens],
            no_turn=self.no_turn,
            shared={},
        )

    def _positions(self, common: Any, tokens: int) -> Tensor:
        """Position of every new token: they are the last ones of their sequences.

        Rows that pad a CUDA graph's batch get any position that there is.
        """
        starts = common.query_start_loc.long()
        first = common.seq_lens.long() - starts[1:]
        token = torch.arange(tokens, device=starts.device)
        row = torch.searchsorted(starts[1:], token, right=True).clamp_(max=len(first) - 1)
        return (first[row] + token).clamp_(0, self.max_length - 1)
