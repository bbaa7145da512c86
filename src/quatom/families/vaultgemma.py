"""VaultGemma: Gemma 2 without norms after attention and feed-forward."""

from quatom.families.decoder import Family
from quatom.families.gemma2 import alternating
from quatom.families.keys import Keys
from quatom.families.spec import ModelConfig


def read(keys: Keys) -> ModelConfig:
    """What a VaultGemmaForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    return alternating(
        keys,
        family="vaultgemma",
        norms={"attention": "input_layernorm", "feed_forward": "pre_feedforward_layernorm"},
    )


VAULTGEMMA = Family(
    name="vaultgemma",
    architectures=("VaultGemmaForCausalLM",),
    model_type="vaultgemma",
    models="VaultGemma 1B",
    read=read,
)
