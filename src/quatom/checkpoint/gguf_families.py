"""What llama.cpp's files of each family hold, and what they leave to llama.cpp's own code."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_LLAMA = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}


@dataclass(frozen=True, slots=True, kw_only=True)
class GGUFFamily:
    """How a `general.architecture` is read as a Hugging Face model."""

    architecture: str
    """Of config.json."""
    model_type: str
    names: Mapping[str, str] = field(default_factory=lambda: _LLAMA)
    """Tensors of a block: llama.cpp's name to Hugging Face's."""
    interleaved: bool = False
    """Rows of q and k are stored for llama.cpp's own rotary embedding: row 2 j + h of a head is
    Hugging Face's row h * head_dim / 2 + j."""
    norm_offset: float = 0.0
    """The file's norm weights are Hugging Face's plus this."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """Further metadata, and the keys of config.json that they become."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """Entries of config.json that llama.cpp knows by itself."""
    score_scale_key: str | None = None
    """Key of config.json whose inverse square root scales scores; llama.cpp takes the head size."""


GGUF_FAMILIES: Mapping[str, GGUFFamily] = {
    "llama": GGUFFamily(architecture="LlamaForCausalLM", model_type="llama", interleaved=True),
    "qwen2": GGUFFamily(architecture="Qwen2ForCausalLM", model_type="qwen2"),
    "qwen3": GGUFFamily(
        architecture="Qwen3ForCausalLM", model_type="qwen3", names=_LLAMA | _QK_NORMS
    ),
    "gemma3": GGUFFamily(
        architecture="Gemma3ForCausalLM",
        model_type="gemma3_text",
        names=_LLAMA
        | _QK_NORMS
        | {
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
        norm_offset=1.0,
        keys={"attention.sliding_window": "sliding_window"},
        constants={
            "hidden_act": "gelu_pytorch_tanh",
            "rope_local_base_freq": 10000.0,
            "sliding_window_pattern": 6,
        },
        score_scale_key="query_pre_attn_scalar",
    ),
}
"""By general.architecture."""
