"""Llama 1 to 3.3 and the models that share its code."""

from collections.abc import Sequence
from typing import Any

from quatom.families.decoder import Family, Feed, decoder, read_feed_forward
from quatom.families.keys import Keys
from quatom.families.rope import Rotary, one_rope
from quatom.families.sizes import Sizes, read_sizes
from quatom.families.spec import FeedForward, ModelConfig, Norm


def read(keys: Keys) -> ModelConfig:
    """What a LlamaForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    sizes = read_sizes(keys, max_position=2048)
    return llama(keys, sizes, one_rope(keys, sizes), family="llama", eps=1e-6)


def llama(
    keys: Keys,
    sizes: Sizes,
    rotary: Rotary,
    *,
    eps: float,
    feed_forward: FeedForward | Sequence[Feed] | None = None,
    **own: Any,
) -> ModelConfig:
    """What Llama and its relatives share.

    Args:
        keys: of config.json.
        sizes: from `read_sizes`.
        rotary: as for `decoder`.
        eps: Default of rms_norm_eps.
        feed_forward: As for `decoder`; None: a gated one.
        own: Arguments of `decoder`.

    Raises:
        ModelError: a key is missing or not supported.
    """
    bias = keys.flag("attention_bias")
    return decoder(
        keys,
        sizes,
        rotary,
        norm=Norm(eps=keys.positive("rms_norm_eps", default=eps)),
        feed_forward=feed_forward or read_feed_forward(keys),
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=keys.flag("mlp_bias"),
        **own,
    )


LLAMA = Family(
    name="llama",
    architectures=("LlamaForCausalLM", "LLaMAForCausalLM"),
    model_type="llama",
    models="Llama 1 to 3.3, CodeLlama, TinyLlama, Vicuna, Yi, SmolLM2, DeepSeek-Coder, "
    "DeepSeek-R1-Distill-Llama",
    read=read,
)
