"""Phi: attention beside the feed-forward layer, LayerNorm, biases everywhere, no gate."""

from quatom.families.decoder import Family, decoder, read_feed_forward
from quatom.families.keys import Keys
from quatom.families.rope import one_rope
from quatom.families.sizes import read_sizes
from quatom.families.spec import ModelConfig, Norm


def read(keys: Keys) -> ModelConfig:
    """What a PhiForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported; LayerNorm of q and k (qk_layernorm) is not.
    """
    sizes = read_sizes(keys, max_position=2048)
    return decoder(
        keys,
        sizes,
        one_rope(keys, sizes, partial=0.5),
        family="phi",
        norm=Norm(kind="layer", eps=keys.positive("layer_norm_eps", default=1e-5), bias=True),
        feed_forward=read_feed_forward(keys, default="gelu_new", gated=False),
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        linears={
            "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "o": ("self_attn.dense",),
            "gate_up": ("mlp.fc1",),
            "down": ("mlp.fc2",),
        },
        norms={"attention": "input_layernorm"},
        parallel=True,
        final_norm_name="model.final_layernorm",
        head_bias=True,
    )


PHI = Family(
    name="phi",
    architectures=("PhiForCausalLM",),
    model_type="phi",
    models="Phi-1, Phi-1.5, Phi-2",
    read=read,
)
