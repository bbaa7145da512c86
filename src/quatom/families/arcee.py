"""Arcee: Llama with a feed-forward layer of squared ReLU without a gate."""

from quatom.families.decoder import LINEARS, Family, read_feed_forward
from quatom.families.keys import Keys
from quatom.families.llama import llama
from quatom.families.rope import one_rope
from quatom.families.sizes import read_sizes
from quatom.families.spec import ModelConfig


def read(keys: Keys) -> ModelConfig:
    """What an ArceeForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    sizes = read_sizes(keys, max_position=4096)
    return llama(
        keys,
        sizes,
        one_rope(keys, sizes),
        family="arcee",
        eps=1e-5,
        feed_forward=read_feed_forward(keys, default="relu2", gated=False),
        linears={**LINEARS, "gate_up": ("mlp.up_proj",)},
    )


ARCEE = Family(
    name="arcee",
    architectures=("ArceeForCausalLM",),
    model_type="arcee",
    models="AFM-4.5B",
    read=read,
)
