"""What an engine asks of a model: the network, its KV cache, and what belongs to it."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from quatom.modeling.context import ForwardContext, Stages
from quatom.recipe import Recipe


class KVCacheLayer(Protocol):
    """One layer's cache (`quatom.numerics.kv_pages.KVPages`)."""

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block of this layer."""

    def copy_blocks(self, source: Tensor, target: Tensor) -> None:
        """Copy whole blocks, (n,) int64 each."""


class Model(Protocol):
    """The network (`quatom.modeling.decoder.Decoder`)."""

    blocks_run: int
    """Blocks begun since the start: a long step shows by it that it makes progress."""

    def forward(
        self,
        input_ids: Tensor,  # (T,) int64
        context: ForwardContext,
        kv_cache: Any,  # what `allocate_kv_cache` of the same model returned
        rows: Tensor | None = None,  # (M,) int64
    ) -> Tensor:
        """Append T new tokens to the cache; hidden states (M, hidden) of the rows asked for.

        Without rows of all, (T, hidden).
        """

    def stages(self, input_ids: Tensor, context: ForwardContext, kv_cache: Any) -> Stages:
        """`forward` that stops for each attention; for CUDA graphs alone.

        Of the context the rest reads positions and slot_mapping alone.
        """

    def finish(self, attended: Tensor, residual: Tensor) -> Tensor:
        """Hidden states (M, hidden) of rows of the last stop: (M, H, D) and (M, hidden)."""

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """(M, hidden) -> (M, vocab) float32."""

    def head_logits(self, hidden: Tensor) -> Tensor:
        """The same, in 16 bits where that loses nothing of them."""

    def limit_length(self, max_length: int) -> None:
        """Say how many tokens the longest sequence will have, before anything runs."""

    def allocate_kv_cache(self, num_blocks: int, block_size: int) -> Sequence[KVCacheLayer]:
        """One cache per layer."""


class ModelLimits(Protocol):
    """Sizes of a model (`quatom.families.spec.ModelConfig`)."""

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""

    @property
    def hidden_size(self) -> int:
        """Channels of a hidden state."""

    @property
    def max_position(self) -> int:
        """Longest sequence, in tokens."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a generation."""


class ServableModel(Protocol):
    """A model with what belongs to it (`quatom.loading.LoadedModel`)."""

    @property
    def model(self) -> Model:
        """The network."""

    @property
    def config(self) -> ModelLimits:
        """Its sizes."""

    @property
    def recipe(self) -> Recipe:
        """How it is quantized."""

    @property
    def tokenizer(self) -> Any:
        """A tokenizer of transformers; None: prompts are lists of token ids."""

    @property
    def device(self) -> torch.device:
        """Where it runs."""

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states."""
