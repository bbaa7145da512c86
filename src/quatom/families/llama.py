"""Llama 1 to 3.3 and the models that share its code."""

from quatom.families.decoder import Family, decoder, read_feed_forward
from quatom.families.keys import Keys
from quatom.families.rope import one_rope
from quatom.families.sizes import read_sizes
from quatom.families.spec import ModelConfig, Norm


def read(keys: Keys) -> ModelConfig:
    """What a LlamaForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    sizes = read_sizes(keys, max_position=2048)
    bias = keys.flag("attention_bias")
    return decoder(
        keys,
        sizes,
        one_rope(keys, sizes),
        family="llama",
        norm=Norm(eps=keys.positive("rms_norm_eps", default=1e-6)),
        feed_forward=read_feed_forward(keys),
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=keys.flag("mlp_bias"),
    )


LLAMA = Family(
    name="llama",
    architectures=("LlamaForCausalLM", "LLaMAForCausalLM"),
    model_type="llama",
    models="Llama 1 to 3.3, CodeLlama, TinyLlama, Vicuna, Yi, SmolLM2, DeepSeek-Coder, "
    "DeepSeek-R1-Distill-Llama",
    read=read,
)
