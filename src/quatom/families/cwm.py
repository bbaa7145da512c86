"""CWM: Llama with a window in three layers of four."""

from dataclasses import replace

from quatom.families.decoder import Family, decoder, read_feed_forward
from quatom.families.keys import Keys
from quatom.families.rope import Rotary, one_rope
from quatom.families.sizes import Sizes, layer_types, read_sizes, windows
from quatom.families.spec import ModelConfig, Norm, RopeScaling

_LLAMA3 = RopeScaling(kind="llama3", factor=16.0, original_max_position=8192)
"""Of a config.json that says nothing of rotary embedding."""


def read(keys: Keys) -> ModelConfig:
    """What a CwmForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    sizes = read_sizes(keys, max_position=131_072, kv_heads=8, head_dim=128)
    every_fourth = ("full_attention", *("sliding_attention",) * 3) * sizes.layers
    types = layer_types(keys, every_fourth[: sizes.layers])
    return decoder(
        keys,
        sizes,
        _rotary(keys, sizes),
        family="cwm",
        norm=Norm(eps=keys.positive("rms_norm_eps", default=1e-5)),
        feed_forward=read_feed_forward(keys),
        windows=windows(types, keys.integer_or_none("sliding_window", default=8192)),
        mlp_bias=keys.flag("mlp_bias"),
    )


def _rotary(keys: Keys, sizes: Sizes) -> Rotary:
    said = keys.under("rope_parameters.") or keys.under("rope_scaling.")
    if not said:
        keys.only("rope_theta", 1e6)  # transformers passes over another one here
    rotary = one_rope(keys, sizes, theta=1e6)
    rope = rotary.ropes[0]
    if said or rope is None:
        return rotary
    return Rotary((replace(rope, scaling=_LLAMA3),) * sizes.layers, sizes.max_position)


CWM = Family(
    name="cwm",
    architectures=("CwmForCausalLM",),
    model_type="cwm",
    models="CWM 32B",
    read=read,
)
