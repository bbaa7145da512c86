"""The first Gemma: Llama with norms of 1 + w, a gate of GELU and embeddings times sqrt(hidden)."""

from math import sqrt

from quatom.families.decoder import Family, decoder, read_feed_forward
from quatom.families.keys import Keys
from quatom.families.rope import one_rope
from quatom.families.sizes import read_sizes
from quatom.families.spec import FeedForward, ModelConfig, Norm


def read(keys: Keys) -> ModelConfig:
    """What a GemmaForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    sizes = read_sizes(keys, max_position=8192, kv_heads=16, head_dim=256)
    bias = keys.flag("attention_bias")
    return decoder(
        keys,
        sizes,
        one_rope(keys, sizes),
        family="gemma",
        norm=gemma_norm(keys),
        feed_forward=_feed_forward(keys),
        attention_bias=bias,
        output_bias=bias,
        tied=True,
        embedding_multiplier=sqrt(sizes.hidden),
    )


def gemma_norm(keys: Keys) -> Norm:
    """A norm of 1 + w."""
    return Norm(eps=keys.positive("rms_norm_eps", default=1e-6), weight_offset=1.0)


def _feed_forward(keys: Keys) -> FeedForward:
    # The released files say "gelu", and mean the tanh approximation that Gemma was trained with.
    keys.only("hidden_act", "gelu", "gelu_pytorch_tanh")
    keys.only("hidden_activation", "gelu_pytorch_tanh")
    return read_feed_forward(keys, "hidden_activation", default="gelu_pytorch_tanh")


GEMMA = Family(
    name="gemma",
    architectures=("GemmaForCausalLM",),
    model_type="gemma",
    models="Gemma 2B and 7B (the first generation), CodeGemma",
    read=read,
)
