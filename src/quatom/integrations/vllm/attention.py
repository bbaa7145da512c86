"""vLLM's attention backend over Quatom's KV pages.

vLLM's model turns q and k before it hands them over. The cache then takes K as the recipe says:

post_rope  the rotation and the mean of K are applied here, as `rope_append_kv` does
pre_rope   K is turned back, stored, and turned again as attention reads it
"""

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.model_executor.utils import set_weight_attrs
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionType, MultipleOf

from quatom.engine.config import EngineConfig
from quatom.errors import BackendError, CheckpointError
from quatom.integrations.vllm.metadata import QuatomMetadata, QuatomMetadataBuilder
from quatom.integrations.vllm.settings import CACHE_DTYPES
from quatom.integrations.vllm.state import CheckpointState
from quatom.modeling.rotary import RotaryTables
from quatom.numerics.kv_pages import (
    BLOCK_MULTIPLE,
    HEAD_DIMS,
    KVDtype,
    KVPages,
    bytes_per_token_head,
)
from quatom.numerics.rotary import head_order, turn_back
from quatom.ops.attention import attention
from quatom.ops.rope_append_kv import rope_append_kv
from quatom.plan import LayerPlan

_FORMATS: dict[str, KVDtype] = {"int4_per_token_head": "int4", "int8_per_token_head": "int8"}


class QuatomCacheMethod(BaseKVCacheMethod):
    """What a layer's cache needs besides pages: the mean of K, and the layer's plan."""

    def __init__(self, config: Any, state: CheckpointState, layer: LayerPlan) -> None:
        super().__init__(config)
        self.state, self.layer = state, layer

    def create_weights(self, layer: Any) -> None:
        """Room for the mean of K of this rank's heads.

        Raises:
            BackendError: vLLM stores this layer's cache in another format than the recipe's.
        """
        wanted = CACHE_DTYPES[self.layer.kv_cache.format]
        if layer.kv_cache_dtype != wanted:
            raise BackendError(
                f"recipe {self.state.recipe.name} has a KV cache that vLLM calls {wanted}, and "
                f"{layer.layer_name} stores {layer.kv_cache_dtype}: use quatom serve"
            )
        super().create_weights(layer)
        layer.quatom = self.layer
        layer.k_offset = None
        attention = self.layer.spec.attention
        order = head_order(attention.rope, attention.head_dim)
        layer.register_buffer("quatom_order", order, persistent=False)
        if not self.layer.offsets_keys:
            return
        layer.k_offset = nn.Parameter(
            torch.full((layer.num_kv_heads, layer.head_size), torch.nan, dtype=torch.float32),
            requires_grad=False,
        )
        set_weight_attrs(layer.k_offset, {"weight_loader": _load_heads})

    def process_weights_after_loading(self, layer: Any) -> None:
        """Tables for K that is cached before rotary embedding: no CUDA graph could make them."""
        super().process_weights_after_loading(layer)
        if layer.k_offset is not None and layer.k_offset.isnan().any():
            raise CheckpointError(
                f"vLLM's model did not load {self.layer.key_offset_name}: it cannot run this model"
            )
        if not self.layer.kv_cache.post_rope and self.state.rotary is None:
            config = self.state.plan.config
            length = get_current_vllm_config().model_config.max_model_len
            self.state.rotary = RotaryTables(config, length, layer._k_scale.device)


def _load_heads(parameter: nn.Parameter, stored: Tensor) -> None:
    """A rank's heads of a stored tensor (KV, D)."""
    from vllm.distributed import (
        get_tensor_model_parallel_rank,
        get_tensor_model_parallel_world_size,
    )

    rank, degree = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    heads = parameter.shape[0]
    ranks_per_head = max(1, degree * heads // stored.shape[0])
    parameter.data.copy_(stored.narrow(0, rank // ranks_per_head * heads, heads))


class QuatomAttentionBackend(AttentionBackend):
    """4-bit and 8-bit caches with one scale and minimum per token and head."""

    forward_includes_kv_cache_update = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[str]] = list(_FORMATS)

    @staticmethod
    def get_name() -> str:
        """The registry's name."""
        return "CUSTOM"

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        """Tokens of a block."""
        return [MultipleOf(BLOCK_MULTIPLE)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """Tokens of a block where the user names none: those of Quatom's own engine."""
        return max(default_block_size, EngineConfig().block_size)

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        """Channels of a head."""
        return list(HEAD_DIMS)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Kernels skip blocks before the window."""
        return True

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """Bytes of a token and head, for vLLM 0.28 and later."""
        form: KVDtype = "int4" if spec.kv_quant_mode.name.startswith("INT4") else "int8"
        return replace(spec, state_content_bytes=bytes_per_token_head(spec.head_size, form))

    @classmethod
    def supported_kv_cache_layouts(cls) -> Any:
        """A block holds one record for each head, for vLLM 0.28 and later."""
        from vllm.v1.kv_cache_interface import KVCacheLayout

        return (KVCacheLayout.LBHNC,)

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "int4_per_token_head",
    ) -> tuple[int, ...]:
        """Shape of the pages in bytes, for vLLM 0.26."""
        record = bytes_per_token_head(head_size, _FORMATS[cache_dtype_str])
        return num_blocks, num_kv_heads, block_size, record

    @staticmethod
    def get_impl_cls() -> type["QuatomAttention"]:
        """The computation."""
        return QuatomAttention

    @staticmethod
    def get_builder_cls() -> type[QuatomMetadataBuilder]:
        """What describes a batch."""
        return QuatomMetadataBuilder


class QuatomCPUAttentionBackend(QuatomAttentionBackend):
    """The same on a CPU."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]

    @staticmethod
    def get_name() -> str:
        """The registry's name: the only one that vLLM knows on a CPU."""
        return "CPU_ATTN"


class QuatomAttention(AttentionImpl):
    """Appends to the cache and attends, for one layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **extra: Any,
    ) -> None:
        """Remember the layer's options.

        Raises:
            BackendError: the layer is no plain causal attention with a cache of its own.
        """
        odd = {
            "alibi_slopes": alibi_slopes,
            "attn_type": None if attn_type == AttentionType.DECODER else attn_type,
            "kv_sharing_target_layer_name": kv_sharing_target_layer_name,
            **extra,
        }
        if given := sorted(name for name, value in odd.items() if value is not None):
            raise BackendError(
                f"Quatom's KV cache does not support attention with {', '.join(given)}: quantize "
                "with kv_cache.format float16"
            )
        self.num_heads, self.head_size, self.num_kv_heads = num_heads, head_size, num_kv_heads
        self.scale, self.sliding_window = float(scale), sliding_window
        self.logits_soft_cap = logits_soft_cap or None
        self.kv_cache_dtype = kv_cache_dtype
        config = get_current_vllm_config()
        quantization = config.quant_config
        if getattr(quantization, "get_name", lambda: None)() != "quatom":
            raise BackendError(
                "Quatom's attention backend runs Quatom checkpoints alone: choose another backend"
            )
        self.state: CheckpointState = quantization.state
        # One long sequence that goes on, and new ones beside it, are the largest usual prefill.
        self.workspace_tokens = (
            config.model_config.max_model_len + config.scheduler_config.max_num_batched_tokens
        )

    def forward(
        self,
        layer: Any,
        query: Tensor,  # (T, H, D), turned by vLLM's model
        key: Tensor,  # (T, KV, D)
        value: Tensor,  # (T, KV, D)
        kv_cache: Tensor,  # (P, KV, S, bytes)
        attn_metadata: QuatomMetadata | None,
        output: Tensor,  # (T, H, D)
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Append the new tokens and attend; rows beyond the batch stay as they are."""
        if attn_metadata is None:  # vLLM measures memory: a prefill's dequantized K and V count
            query.new_empty(2, self.workspace_tokens, self.num_kv_heads, self.head_size)
            return output.zero_()
        batch, cache = attn_metadata, self.state.recipe.kv_cache
        tokens = batch.num_tokens
        q, k, v = query[:tokens], key[:tokens], value[:tokens]
        if layer.quatom_order is not None:  # as kernels turn and rotate them
            q, k = q[..., layer.quatom_order], k[..., layer.quatom_order]
        blocks, heads, block_size, _ = kv_cache.shape
        form = _FORMATS[self.kv_cache_dtype]
        storage = kv_cache.view(torch.uint8).view(blocks, heads, -1)
        pages = KVPages(storage, block_size, self.head_size, form)
        tables = None
        if not cache.post_rope:
            assert self.state.rotary is not None
            tables = self.state.rotary.of(layer.quatom.index)
            k = turn_back(k, *tables, batch.positions)
        q = rope_append_kv(
            q,
            k,
            v,
            *batch.no_turn,
            batch.first_positions,
            batch.slot_mapping,
            pages,
            rotate_keys_in_cache=tables is None,
            rotate_kv=cache.rotates_keys,
            clip_ratio=cache.clip_ratio,
            key_offset=layer.k_offset,
            shared=batch.shared,
        )
        attended = attention(
            q,
            pages,
            block_tables=batch.block_tables,
            cu_seqlens_q=batch.cu_seqlens_q,
            seq_lens=batch.seq_lens,
            max_seqlen_q=batch.max_seqlen_q,
            max_seq_len=batch.max_seq_len,
            softmax_scale=self.scale,
            sliding_window=self.sliding_window,
            logit_softcap=self.logits_soft_cap,
            rotary=tables,
            num_decodes=batch.num_decodes,
            total_kv_tokens=batch.total_kv_tokens,
            prefill_cu_seqlens=batch.prefill_cu_seqlens,
            shared=batch.shared,
        )
        output.view(-1, self.num_heads, self.head_size)[:tokens].copy_(attended)
        return output
