"""InternLM 3: Llama with other defaults; qkv_bias and bias are two keys of its files."""

from quatom.families.decoder import Family, decoder, read_feed_forward
from quatom.families.keys import Keys
from quatom.families.rope import one_rope
from quatom.families.sizes import read_sizes
from quatom.families.spec import ModelConfig, Norm


def read(keys: Keys) -> ModelConfig:
    """What an InternLM3ForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    sizes = read_sizes(keys, max_position=32_768, kv_heads=2, head_dim=128)
    bias = keys.flag("mlp_bias", "bias")
    return decoder(
        keys,
        sizes,
        one_rope(keys, sizes),
        family="internlm3",
        norm=Norm(eps=keys.positive("rms_norm_eps", default=1e-5)),
        feed_forward=read_feed_forward(keys),
        attention_bias=keys.flag("attention_bias", "qkv_bias"),
        output_bias=bias,
        mlp_bias=bias,
    )


INTERNLM3 = Family(
    name="internlm3",
    architectures=("InternLM3ForCausalLM",),
    model_type="internlm3",
    saved_as="LlamaForCausalLM",
    models="InternLM3-8B",
    read=read,
)
