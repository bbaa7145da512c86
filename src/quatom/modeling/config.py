"""What a decoder computes: sizes and constants, checked."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from quatom.errors import ModelError

Architecture = Literal["llama", "qwen2"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the pre-training length."""

    kind: Literal["linear", "llama3"]
    """linear divides every frequency by `factor`; llama3 only the low ones, with a ramp."""
    factor: float
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_max_position / low_freq_factor are divided by factor."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_max_position / high_freq_factor stay as they are."""
    original_max_position: int = 8192
    """llama3: context length of pre-training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Sizes and constants of a decoder of the Llama family.

    Linear shapes (N, K): q_proj (num_heads * head_dim, hidden_size), k_proj and v_proj
    (num_kv_heads * head_dim, hidden_size), o_proj (hidden_size, num_heads * head_dim), gate_proj
    and up_proj (intermediate_size, hidden_size), down_proj (hidden_size, intermediate_size).
    """

    architecture: Architecture
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    """Heads of K and V; each serves num_heads / num_kv_heads query heads."""
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    max_position: int
    """Longest sequence, in tokens."""
    tie_word_embeddings: bool = False
    """The output projection is the embedding matrix; lm_head.weight is not stored."""
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    """Tokens that a query sees, itself included, in every layer; None: all before it."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    """Tokens that end a generation; may be empty."""

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_position",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ModelError(f"{name} must be a positive integer, got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"num_attention_heads {self.num_heads} is not a multiple of num_key_value_heads "
                f"{self.num_kv_heads}: query heads cannot be shared out equally"
            )
        if self.head_dim % 2:
            raise ModelError(f"head_dim {self.head_dim} is odd; rotary embedding pairs channels")
        if not self.rms_norm_eps > 0.0:
            raise ModelError(f"rms_norm_eps must be positive, got {self.rms_norm_eps}")
        if not self.rope_theta > 0.0:
            raise ModelError(f"rope_theta must be positive, got {self.rope_theta}")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """Read a config.json as transformers 4 or 5 writes it: see `hf_config`.

        Raises:
            ModelError: the architecture is not supported, a key is missing, or a key or value
                changes the mathematics in a way that Quatom does not implement.
        """
        from quatom.modeling.hf_config import read_hf_config  # it builds RopeScaling: no cycle

        return cls(**read_hf_config(config))
