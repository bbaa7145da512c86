"""Solar Open: corrected experts beside a shared one, in every layer."""

from quatom.families.corrected import beside_shared, corrected_router
from quatom.families.decoder import Family, activation, decoder
from quatom.families.keys import Keys
from quatom.families.rope import one_rope
from quatom.families.sizes import read_sizes
from quatom.families.spec import ModelConfig, Norm


def read(keys: Keys) -> ModelConfig:
    """What a SolarOpenForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    sizes = read_sizes(keys, max_position=131_072, kv_heads=8, head_dim=128)
    keys.only("first_k_dense_replace", 0)
    keys.ignore("intermediate_size")  # of dense layers, which there are none
    feed = beside_shared(
        keys,
        sizes.hidden,
        activation(keys, default="silu"),
        corrected_router(keys),
        width=1280,
        count=128,
    )
    return decoder(
        keys,
        sizes,
        one_rope(keys, sizes, theta=1e6),
        family="solar_open",
        norm=Norm(eps=keys.positive("rms_norm_eps", default=1e-5)),
        feed_forward=(feed,) * sizes.layers,
        attention_bias=keys.flag("attention_bias"),
    )


SOLAR_OPEN = Family(
    name="solar_open",
    architectures=("SolarOpenForCausalLM",),
    model_type="solar_open",
    models="Solar-Open-100B",
    read=read,
)
