"""OLMoE: norms over all heads of q and k, experts in every layer."""

from typing import Any

from quatom.families.decoder import Family, decoder, read_feed_forward
from quatom.families.experts import expert_feed
from quatom.families.keys import Keys
from quatom.families.rope import Rotary, one_rope
from quatom.families.sizes import Sizes, read_sizes
from quatom.families.spec import ModelConfig, Norm, Router


def read(keys: Keys) -> ModelConfig:
    """What an OlmoeForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    keys.only("clip_qkv")  # q, k and v would be clamped
    sizes = read_sizes(keys, max_position=4096)
    rotary = one_rope(keys, sizes)
    return olmoe(keys, sizes, rotary, count=64, top_k=8, eps=1e-5, family="olmoe")


def olmoe(
    keys: Keys, sizes: Sizes, rotary: Rotary, *, count: int, top_k: int, eps: float, **own: Any
) -> ModelConfig:
    """What OLMoE and FlexOlmo share.

    Args:
        keys: of config.json.
        sizes: from `read_sizes`.
        rotary: as for `decoder`.
        count: Default of num_experts.
        top_k: Default of num_experts_per_tok.
        eps: Default of rms_norm_eps.
        own: Arguments of `decoder`.

    Raises:
        ModelError: a key is missing or not supported.
    """
    feed = expert_feed(
        sizes.hidden,
        count=keys.integer("num_experts", "num_local_experts", default=count),
        top_k=keys.integer("num_experts_per_tok", default=top_k),
        feed_forward=read_feed_forward(keys),
        router=Router(normalized=keys.flag("norm_topk_prob")),
        tensors={"weight": ("mlp.gate.weight",)},
    )
    norm = Norm(eps=keys.positive("rms_norm_eps", default=eps))
    bias = keys.flag("attention_bias")
    return decoder(
        keys,
        sizes,
        rotary,
        norm=norm,
        feed_forward=(feed,) * sizes.layers,
        qk_norm=norm,
        qk_norm_axis="all",
        attention_bias=bias,
        output_bias=bias,
        **own,
    )


OLMOE = Family(
    name="olmoe",
    architectures=("OlmoeForCausalLM",),
    model_type="olmoe",
    models="OLMoE-1B-7B",
    read=read,
)
