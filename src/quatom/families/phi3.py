"""Phi-3 and Phi-4: Llama with fused projections in the file."""

from quatom.families.decoder import LINEARS, Family, decoder, read_feed_forward
from quatom.families.keys import Keys
from quatom.families.rope import one_rope
from quatom.families.sizes import read_sizes, same_window
from quatom.families.spec import ModelConfig, Norm


def read(keys: Keys) -> ModelConfig:
    """What a Phi3ForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    # Phi-4-mini lists switches of unpublished variants.
    keys.only("full_attn_mod", 1)
    keys.only("interpolate_factor", 1)
    sizes = read_sizes(keys, max_position=4096)
    rotary = one_rope(
        keys,
        sizes,
        partial=1.0,
        renamed={"su": "longrope", "yarn": "longrope"},
        own_original=4096,
    )
    window = keys.integer_or_none("sliding_window", default=None)
    return decoder(
        keys,
        sizes,
        rotary,
        family="phi3",
        norm=Norm(eps=keys.positive("rms_norm_eps", default=1e-5)),
        feed_forward=read_feed_forward(keys),
        windows=same_window(keys, sizes.layers, window),
        linears={
            **LINEARS,
            "qkv": ("self_attn.qkv_proj",),
            "gate_up": ("mlp.gate_up_proj",),
        },
    )


PHI3 = Family(
    name="phi3",
    architectures=("Phi3ForCausalLM",),
    model_type="phi3",
    models="Phi-3-mini, Phi-3-medium, Phi-3.5-mini, Phi-4, Phi-4-mini",
    read=read,
)
