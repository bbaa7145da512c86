"""VaultGemma: Gemma 2 without norms after attention and feed-forward."""

from quatom.families.decoder import Family
from quatom.families.gemma2 import gemma
from quatom.families.keys import Keys
from quatom.families.rope import one_rope
from quatom.families.sizes import periodic_layer_types, read_sizes
from quatom.families.spec import ModelConfig


def read(keys: Keys) -> ModelConfig:
    """What a VaultGemmaForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    sizes = read_sizes(keys, max_position=8192, kv_heads=4, head_dim=256)
    return gemma(
        keys,
        sizes,
        one_rope(keys, sizes),
        periodic_layer_types(keys, sizes.layers, every=2),
        family="vaultgemma",
        norms={"attention": "input_layernorm", "feed_forward": "pre_feedforward_layernorm"},
        score_softcap=keys.number_or_none("attn_logit_softcapping", default=50.0),
        logit_softcap=keys.number_or_none("final_logit_softcapping", default=30.0),
    )


VAULTGEMMA = Family(
    name="vaultgemma",
    architectures=("VaultGemmaForCausalLM",),
    model_type="vaultgemma",
    models="VaultGemma 1B",
    read=read,
)
