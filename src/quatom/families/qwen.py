"""Qwen2 and Qwen2.5 (biases of q, k and v), Qwen3 (norms of q and k)."""

from quatom.families.decoder import Family, decoder, read_feed_forward
from quatom.families.keys import Keys
from quatom.families.rope import one_rope
from quatom.families.sizes import layer_types, read_sizes, windows
from quatom.families.spec import ModelConfig, Norm


def read_qwen2(keys: Keys) -> ModelConfig:
    """What a Qwen2ForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    # It has no such switch: q, k and v have biases, o has none.
    keys.only("attention_bias", True)
    sizes = read_sizes(keys, max_position=32_768, kv_heads=32)
    return decoder(
        keys,
        sizes,
        one_rope(keys, sizes),
        family="qwen2",
        norm=_norm(keys),
        feed_forward=read_feed_forward(keys),
        windows=_windows(keys, sizes.layers),
        attention_bias=True,
    )


def read_qwen3(keys: Keys) -> ModelConfig:
    """What a Qwen3ForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    sizes = read_sizes(keys, max_position=32_768, kv_heads=32, head_dim=128)
    bias = keys.flag("attention_bias")
    return decoder(
        keys,
        sizes,
        one_rope(keys, sizes),
        family="qwen3",
        norm=_norm(keys),
        feed_forward=read_feed_forward(keys),
        windows=_windows(keys, sizes.layers),
        qk_norm=_norm(keys),
        attention_bias=bias,
        output_bias=bias,
    )


def _norm(keys: Keys) -> Norm:
    return Norm(eps=keys.positive("rms_norm_eps", default=1e-6))


def _windows(keys: Keys, layers: int) -> tuple[int | None, ...]:
    """Without layer_types, the window holds from layer max_window_layers on."""
    window = keys.integer_or_none("sliding_window", default=4096)
    if not keys.flag("use_sliding_window"):
        window = None
    full = keys.integer("max_window_layers", default=28, least=0)
    default = [
        "full_attention" if window is None or layer < full else "sliding_attention"
        for layer in range(layers)
    ]
    return windows(layer_types(keys, default), window)


QWEN2 = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    model_type="qwen2",
    models="Qwen2, Qwen2.5, Qwen2.5-Coder, QwQ, DeepSeek-R1-Distill-Qwen",
    read=read_qwen2,
)
QWEN3 = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    model_type="qwen3",
    models="Qwen3 (dense)",
    read=read_qwen3,
)
