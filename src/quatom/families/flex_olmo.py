"""FlexOlmo: OLMo-2 with experts in every layer."""

from quatom.families.decoder import NORMS_AFTER, Family
from quatom.families.keys import Keys
from quatom.families.olmoe import olmoe
from quatom.families.rope import one_rope
from quatom.families.sizes import read_sizes
from quatom.families.spec import ModelConfig


def read(keys: Keys) -> ModelConfig:
    """What a FlexOlmoForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    sizes = read_sizes(keys, max_position=4096)
    return olmoe(
        keys,
        sizes,
        one_rope(keys, sizes, theta=500_000.0),
        count=7,
        top_k=5,
        eps=1e-6,
        family="flex_olmo",
        norms=NORMS_AFTER,
    )


FLEX_OLMO = Family(
    name="flex_olmo",
    architectures=("FlexOlmoForCausalLM",),
    model_type="flex_olmo",
    models="FlexOlmo-7x7B",
    read=read,
)
