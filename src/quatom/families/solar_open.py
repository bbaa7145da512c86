"""Solar Open: corrected experts beside a shared one, in every layer."""

from quatom.families.corrected import CORRECTED, corrected_router
from quatom.families.decoder import Family, activation, decoder
from quatom.families.experts import expert_feed, shared_feed
from quatom.families.keys import Keys
from quatom.families.rope import one_rope
from quatom.families.sizes import read_sizes
from quatom.families.spec import FeedForward, ModelConfig, Norm


def read(keys: Keys) -> ModelConfig:
    """What a SolarOpenForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    sizes = read_sizes(keys, max_position=131_072, kv_heads=8, head_dim=128)
    keys.only("first_k_dense_replace", 0)
    keys.ignore("intermediate_size")  # of dense layers, which there are none
    width = keys.integer("moe_intermediate_size", default=1280)
    acts = activation(keys, default="silu")
    shared = FeedForward(size=width * keys.integer("n_shared_experts", default=1), activation=acts)
    feed = expert_feed(
        sizes.hidden,
        count=keys.integer("n_routed_experts", "num_local_experts", default=128),
        top_k=keys.integer("num_experts_per_tok", default=8),
        feed_forward=FeedForward(size=width, activation=acts),
        router=corrected_router(keys),
        tensors=CORRECTED,
        shared=shared_feed(shared, sizes.hidden, "mlp.shared_experts"),
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
