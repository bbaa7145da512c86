"""Mixtral: Mistral with experts in every layer."""

from quatom.families.decoder import Family, decoder, read_feed_forward
from quatom.families.experts import BY_NUMBER, expert_feed
from quatom.families.keys import Keys
from quatom.families.rope import one_rope
from quatom.families.sizes import read_sizes, same_window
from quatom.families.spec import ModelConfig, Norm, Router


def read(keys: Keys) -> ModelConfig:
    """What a MixtralForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    keys.ignore("router_jitter_noise")  # in training alone
    sizes = read_sizes(keys, max_position=131_072, kv_heads=8)
    feed = expert_feed(
        sizes.hidden,
        count=keys.integer("num_local_experts", "num_experts", default=8),
        top_k=keys.integer("num_experts_per_tok", default=2),
        feed_forward=read_feed_forward(keys),
        router=Router(normalized=True),
        tensors={"weight": ("mlp.gate.weight", "block_sparse_moe.gate.weight")},
        spellings=BY_NUMBER,
    )
    window = keys.integer_or_none("sliding_window", default=None)
    return decoder(
        keys,
        sizes,
        one_rope(keys, sizes, theta=1e6),
        family="mixtral",
        norm=Norm(eps=keys.positive("rms_norm_eps", default=1e-5)),
        feed_forward=(feed,) * sizes.layers,
        windows=same_window(keys, sizes.layers, window),
    )


MIXTRAL = Family(
    name="mixtral",
    architectures=("MixtralForCausalLM",),
    model_type="mixtral",
    models="Mixtral 8x7B and 8x22B",
    read=read,
)
