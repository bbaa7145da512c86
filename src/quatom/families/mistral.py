"""Mistral: Llama with a sliding window in all layers, or (Ministral) in some."""

from quatom.families.decoder import Family, decoder, read_feed_forward
from quatom.families.keys import Keys
from quatom.families.rope import one_rope
from quatom.families.sizes import layer_types, read_sizes, same_window, windows
from quatom.families.spec import ModelConfig, Norm


def read_mistral(keys: Keys) -> ModelConfig:
    """What a MistralForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    window = keys.integer_or_none("sliding_window", default=4096)
    return _read(keys, "mistral", same_window(keys, keys.integer("num_hidden_layers"), window))


def read_ministral(keys: Keys) -> ModelConfig:
    """What a MinistralForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    window = keys.integer_or_none("sliding_window", default=4096)
    kind = "full_attention" if window is None else "sliding_attention"
    types = layer_types(keys, [kind] * keys.integer("num_hidden_layers"))
    return _read(keys, "ministral", windows(types, window))


def _read(keys: Keys, family: str, windows: tuple[int | None, ...]) -> ModelConfig:
    sizes = read_sizes(keys, max_position=131_072, kv_heads=8)
    return decoder(
        keys,
        sizes,
        one_rope(keys, sizes),
        family=family,
        norm=Norm(eps=keys.positive("rms_norm_eps", default=1e-6)),
        feed_forward=read_feed_forward(keys),
        windows=windows,
    )


MISTRAL = Family(
    name="mistral",
    architectures=("MistralForCausalLM",),
    model_type="mistral",
    models="Mistral 7B, Mistral-Nemo, Mistral-Small, Ministral-8B-2410, Codestral, Zephyr",
    read=read_mistral,
)
MINISTRAL = Family(
    name="ministral",
    architectures=("MinistralForCausalLM",),
    model_type="ministral",
    models="Ministral with windows in some layers",
    read=read_ministral,
)
