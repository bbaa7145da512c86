"""StableLM: LayerNorm, a quarter of each head turns."""

from dataclasses import replace

from quatom.families.decoder import NORMS_BEFORE, Family, decoder, read_feed_forward
from quatom.families.keys import Keys
from quatom.families.rope import one_rope
from quatom.families.sizes import read_sizes
from quatom.families.spec import ModelConfig, Norm


def read(keys: Keys) -> ModelConfig:
    """What a StableLmForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    parallel = keys.flag("use_parallel_residual")
    normalized = keys.flag("qk_layernorm")
    keys.only("rotary_scaling_factor", 1.0)
    sizes = read_sizes(keys, max_position=4096, kv_heads=32)
    keys.only("head_dim", sizes.hidden // sizes.heads)
    eps = keys.positive("layer_norm_eps", "norm_eps", default=1e-5)
    config = decoder(
        keys,
        sizes,
        one_rope(keys, sizes, partial=0.25),
        family="stablelm",
        norm=Norm(kind="layer", eps=eps, bias=True),
        feed_forward=read_feed_forward(keys),
        qk_norm=Norm(kind="layer", eps=eps) if normalized else None,
        qk_norm_axis="each",
        attention_bias=keys.flag("use_qkv_bias"),
        norms={"attention": NORMS_BEFORE["attention"]} if parallel else NORMS_BEFORE,
        parallel=parallel,
    )
    names = ("self_attn.q_layernorm", "self_attn.k_layernorm")
    parts = ("self_attn.q_layernorm.norms.{}", "self_attn.k_layernorm.norms.{}")
    layers = (replace(x, qk_norm_names=names, qk_norm_parts=parts) for x in config.layers)
    return replace(config, layers=tuple(layers)) if normalized else config


STABLELM = Family(
    name="stablelm",
    architectures=("StableLmForCausalLM",),
    model_type="stablelm",
    models="StableLM-3B-4E1T, StableLM 2 1.6B, StableLM-Zephyr",
    read=read,
)
