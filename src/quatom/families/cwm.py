"""CWM: Llama with a window in three layers of four."""

from quatom.families.decoder import Family, decoder, read_feed_forward
from quatom.families.keys import Keys
from quatom.families.rope import one_rope
from quatom.families.sizes import periodic_layer_types, read_sizes, windows
from quatom.families.spec import ModelConfig, Norm, RopeScaling

_LLAMA3 = RopeScaling(kind="llama3", factor=16.0, original_max_position=8192)
"""Of a config.json that says nothing of rotary embedding."""


def read(keys: Keys) -> ModelConfig:
    """What a CwmForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    sizes = read_sizes(keys, max_position=131_072, kv_heads=8, head_dim=128)
    if not (keys.under("rope_parameters.") or keys.under("rope_scaling.")):
        keys.only("rope_theta", 1e6)  # transformers passes over another one here
    types = periodic_layer_types(keys, sizes.layers, every=4, first=True)
    return decoder(
        keys,
        sizes,
        one_rope(keys, sizes, theta=1e6, scaling=_LLAMA3),
        family="cwm",
        norm=Norm(eps=keys.positive("rms_norm_eps", default=1e-5)),
        feed_forward=read_feed_forward(keys),
        windows=windows(types, keys.integer_or_none("sliding_window", default=8192)),
        mlp_bias=keys.flag("mlp_bias"),
    )


CWM = Family(
    name="cwm",
    architectures=("CwmForCausalLM",),
    model_type="cwm",
    models="CWM 32B",
    read=read,
)
