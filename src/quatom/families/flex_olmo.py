"""FlexOlmo: OLMo-2 with experts in every layer."""

from quatom.families.decoder import NORMS_AFTER, Family, decoder, read_feed_forward
from quatom.families.experts import expert_feed
from quatom.families.keys import Keys
from quatom.families.rope import one_rope
from quatom.families.sizes import read_sizes
from quatom.families.spec import ModelConfig, Norm, Router


def read(keys: Keys) -> ModelConfig:
    """What a FlexOlmoForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    sizes = read_sizes(keys, max_position=4096)
    feed = expert_feed(
        sizes.hidden,
        count=keys.integer("num_experts", "num_local_experts", default=7),
        top_k=keys.integer("num_experts_per_tok", default=5),
        feed_forward=read_feed_forward(keys),
        router=Router(normalized=keys.flag("norm_topk_prob")),
        tensors={"weight": ("mlp.gate.weight",)},
    )
    norm = Norm(eps=keys.positive("rms_norm_eps", default=1e-6))
    bias = keys.flag("attention_bias")
    return decoder(
        keys,
        sizes,
        one_rope(keys, sizes, theta=500_000.0),
        family="flex_olmo",
        norm=norm,
        feed_forward=(feed,) * sizes.layers,
        qk_norm=norm,
        qk_norm_axis="all",
        attention_bias=bias,
        output_bias=bias,
        norms=NORMS_AFTER,
    )


FLEX_OLMO = Family(
    name="flex_olmo",
    architectures=("FlexOlmoForCausalLM",),
    model_type="flex_olmo",
    models="FlexOlmo-7x7B",
    read=read,
)
