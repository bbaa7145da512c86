"""GLM-4 (dense): half of each head turns, in neighbouring pairs; fused gate and up in the file."""

from collections.abc import Mapping

from quatom.families.decoder import LINEARS, NORMS_BEFORE, Family, decoder, read_feed_forward
from quatom.families.keys import Keys
from quatom.families.rope import one_rope
from quatom.families.sizes import read_sizes
from quatom.families.spec import ModelConfig, Norm, NormName


def read_glm(keys: Keys) -> ModelConfig:
    """What a GlmForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    return _read(keys, "glm", NORMS_BEFORE)


def read_glm4(keys: Keys) -> ModelConfig:
    """What a Glm4ForCausalLM computes: norms after attention and feed-forward, too.

    Raises:
        ModelError: a key is missing or not supported.
    """
    after: Mapping[NormName, str] = {
        "attention_output": "post_self_attn_layernorm",
        "feed_forward_output": "post_mlp_layernorm",
    }
    return _read(keys, "glm4", {**NORMS_BEFORE, **after})


def _read(keys: Keys, family: str, norms: Mapping[NormName, str]) -> ModelConfig:
    sizes = read_sizes(keys, max_position=131_072, kv_heads=2, head_dim=128)
    return decoder(
        keys,
        sizes,
        one_rope(keys, sizes, partial=0.5, interleaved=True),
        family=family,
        norm=Norm(eps=keys.positive("rms_norm_eps", default=1.5625e-7)),
        feed_forward=read_feed_forward(keys),
        attention_bias=keys.flag("attention_bias", default=True),
        linears={**LINEARS, "gate_up": ("mlp.gate_up_proj",)},
        norms=norms,
    )


GLM = Family(
    name="glm",
    architectures=("GlmForCausalLM",),
    model_type="glm",
    models="GLM-4-9B as converted for transformers, GLM-Edge",
    read=read_glm,
)
GLM4 = Family(
    name="glm4",
    architectures=("Glm4ForCausalLM",),
    model_type="glm4",
    models="GLM-4-0414, GLM-Z1",
    read=read_glm4,
)
