"""Phi-3.5-MoE: LayerNorm, biases, and two experts chosen one after the other."""

from dataclasses import replace

from quatom.errors import ModelError
from quatom.families.decoder import Family, decoder, read_feed_forward
from quatom.families.experts import BY_NUMBER, expert_feed
from quatom.families.keys import Keys
from quatom.families.rope import Rotary, one_rope
from quatom.families.sizes import Sizes, read_sizes, same_window
from quatom.families.spec import ModelConfig, Norm, Router


def read(keys: Keys) -> ModelConfig:
    """What a PhimoeForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    keys.ignore("input_jitter_noise")  # in training alone
    sizes = read_sizes(keys, max_position=131_072, kv_heads=8)
    feed = expert_feed(
        sizes.hidden,
        count=keys.integer("num_local_experts", "num_experts", default=16),
        top_k=keys.integer("num_experts_per_tok", default=2),
        feed_forward=read_feed_forward(keys),
        router=Router(
            scores="sparsemixer", jitter=keys.number("router_jitter_noise", default=0.01)
        ),
        tensors={"weight": ("mlp.router.weight", "block_sparse_moe.gate.weight")},
        spellings=BY_NUMBER,
    )
    bias = keys.flag("attention_bias")
    return decoder(
        keys,
        sizes,
        _rotary(keys, sizes),
        family="phimoe",
        norm=Norm(kind="layer", eps=keys.positive("rms_norm_eps", default=1e-5), bias=True),
        feed_forward=(feed,) * sizes.layers,
        windows=same_window(
            keys, sizes.layers, keys.integer_or_none("sliding_window", default=None)
        ),
        attention_bias=bias,
        output_bias=bias,
        head_bias=keys.flag("lm_head_bias"),
    )


def _rotary(keys: Keys, sizes: Sizes) -> Rotary:
    """Longrope whose cos and sin have a factor of the file's own."""
    factors = []
    for name in ("short_mscale", "long_mscale"):
        sections = (f"rope_parameters.{name}", f"rope_scaling.{name}")
        factors.append(None if keys.value(*sections) is None else keys.positive(*sections))
    rotary = one_rope(keys, sizes, theta=1e6)
    rope = rotary.ropes[0]
    if rope is None or rope.scaling is None:
        return rotary
    short, long = factors
    if rope.scaling.kind != "longrope" or short is None or short != long:
        raise ModelError(
            f"rope_type {rope.scaling.kind} with short_mscale {short} and long_mscale {long} is "
            "not supported for this family: it must be longrope, with one factor for both"
        )
    scaling = replace(rope.scaling, attention_factor=short)
    return Rotary((replace(rope, scaling=scaling),) * sizes.layers, rotary.max_position)


PHI_MOE = Family(
    name="phimoe",
    architectures=("PhimoeForCausalLM", "PhiMoEForCausalLM"),
    model_type="phimoe",
    models="Phi-3.5-MoE",
    read=read,
)
