"""OLMoE: norms over all heads of q and k, experts in every layer."""

from quatom.families.decoder import Family, decoder, read_feed_forward
from quatom.families.experts import expert_feed
from quatom.families.keys import Keys
from quatom.families.rope import one_rope
from quatom.families.sizes import read_sizes
from quatom.families.spec import ModelConfig, Norm, Router


def read(keys: Keys) -> ModelConfig:
    """What an OlmoeForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    keys.only("clip_qkv")  # q, k and v would be clamped
    sizes = read_sizes(keys, max_position=4096)
    feed = expert_feed(
        sizes.hidden,
        count=keys.integer("num_experts", "num_local_experts", default=64),
        top_k=keys.integer("num_experts_per_tok", default=8),
        feed_forward=read_feed_forward(keys),
        router=Router(normalized=keys.flag("norm_topk_prob")),
        tensors={"weight": ("mlp.gate.weight",)},
    )
    norm = Norm(eps=keys.positive("rms_norm_eps", default=1e-5))
    bias = keys.flag("attention_bias")
    return decoder(
        keys,
        sizes,
        one_rope(keys, sizes),
        family="olmoe",
        norm=norm,
        feed_forward=(feed,) * sizes.layers,
        qk_norm=norm,
        qk_norm_axis="all",
        attention_bias=bias,
        output_bias=bias,
    )


OLMOE = Family(
    name="olmoe",
    architectures=("OlmoeForCausalLM",),
    model_type="olmoe",
    models="OLMoE-1B-7B",
    read=read,
)
