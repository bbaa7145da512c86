"""Text models of Gemma 3: Gemma 2 with norms of q and k, and two rotary tables."""

from quatom.families.decoder import Family
from quatom.families.gemma import gemma_norm
from quatom.families.gemma2 import gemma
from quatom.families.keys import Keys
from quatom.families.rope import ropes_by_layer_type
from quatom.families.sizes import periodic_layer_types, read_sizes
from quatom.families.spec import ModelConfig


def read(keys: Keys) -> ModelConfig:
    """What a Gemma3ForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    keys.only("attn_logit_softcapping")  # transformers has the key and does not apply it
    sizes = read_sizes(keys, max_position=131_072, kv_heads=4, head_dim=256)
    every = keys.integer("sliding_window_pattern", default=6)
    types = periodic_layer_types(keys, sizes.layers, every=every)
    rotary = ropes_by_layer_type(
        keys,
        sizes,
        types,
        theta={"full_attention": 1e6, "sliding_attention": 1e4},
        theta_names={
            "full_attention": "rope_theta",
            "sliding_attention": "rope_local_base_freq",
        },
    )
    return gemma(
        keys,
        sizes,
        rotary,
        types,
        family="gemma3",
        qk_norm=gemma_norm(keys),
        logit_softcap=keys.number_or_none("final_logit_softcapping", default=None),
    )


GEMMA3 = Family(
    name="gemma3",
    architectures=("Gemma3ForCausalLM",),
    model_type="gemma3_text",
    models="Gemma 3 270M and 1B, the language part of 4B, 12B and 27B",
    read=read,
)
