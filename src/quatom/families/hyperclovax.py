"""HyperCLOVA X: Granite with norms after attention and feed-forward, and logits multiplied."""

from collections.abc import Mapping

from quatom.families.decoder import NORMS_BEFORE, Family
from quatom.families.keys import Keys
from quatom.families.llama import llama
from quatom.families.rope import one_rope
from quatom.families.sizes import read_sizes
from quatom.families.spec import ModelConfig, NormName

_AFTER: Mapping[NormName, str] = {
    "attention_output": "post_norm1",
    "feed_forward_output": "post_norm2",
}


def read(keys: Keys) -> ModelConfig:
    """What a HyperCLOVAXForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    sizes = read_sizes(keys, max_position=2048)
    after = _AFTER if keys.flag("use_post_norm", default=True) else {}
    return llama(
        keys,
        sizes,
        one_rope(keys, sizes),
        family="hyperclovax",
        eps=1e-6,
        scale=keys.positive("attention_multiplier", default=sizes.head_dim**-0.5),
        norms={**NORMS_BEFORE, **after},
        residual_multiplier=keys.positive("residual_multiplier", default=1.0),
        embedding_multiplier=keys.positive("embedding_multiplier", default=1.0),
        logits_divisor=1.0 / keys.positive("logits_scaling", default=1.0),
    )


HYPERCLOVAX = Family(
    name="hyperclovax",
    architectures=("HyperCLOVAXForCausalLM",),
    model_type="hyperclovax",
    models="HyperCLOVA X SEED Think 14B",
    read=read,
)
