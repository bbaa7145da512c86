"""ERNIE 4.5 (dense) and Helium: Llama whose heads turn in neighbouring pairs of channels."""

from quatom.families.decoder import Family, decoder, read_feed_forward
from quatom.families.keys import Keys
from quatom.families.rope import one_rope
from quatom.families.sizes import read_sizes
from quatom.families.spec import ModelConfig, Norm


def read_ernie(keys: Keys) -> ModelConfig:
    """What an Ernie4_5ForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    sizes = read_sizes(keys, max_position=131_072, kv_heads=2, head_dim=128)
    bias = keys.flag("use_bias")
    return decoder(
        keys,
        sizes,
        one_rope(keys, sizes, theta=500_000.0, interleaved=True),
        family="ernie4_5",
        norm=Norm(eps=keys.positive("rms_norm_eps", default=1e-5)),
        feed_forward=read_feed_forward(keys),
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        tied=True,
    )


def read_helium(keys: Keys) -> ModelConfig:
    """What a HeliumForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    sizes = read_sizes(keys, max_position=4096, kv_heads=20, head_dim=128)
    return decoder(
        keys,
        sizes,
        one_rope(keys, sizes, theta=100_000.0, interleaved=True),
        family="helium",
        norm=Norm(eps=keys.positive("rms_norm_eps", default=1e-8)),
        feed_forward=read_feed_forward(keys),
        attention_bias=keys.flag("attention_bias"),
        mlp_bias=keys.flag("mlp_bias"),
    )


ERNIE4_5 = Family(
    name="ernie4_5",
    architectures=("Ernie4_5ForCausalLM", "Ernie4_5_ForCausalLM"),
    model_type="ernie4_5",
    models="ERNIE-4.5-0.3B",
    read=read_ernie,
)
HELIUM = Family(
    name="helium",
    architectures=("HeliumForCausalLM",),
    model_type="helium",
    models="Helium-1",
    read=read_helium,
)
