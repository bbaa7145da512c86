"""GPT-J: attention beside the feed-forward layer, a part of each head turns in adjacent pairs."""

from quatom.families.decoder import Family, activation, decoder
from quatom.families.keys import Keys
from quatom.families.rope import Rotary
from quatom.families.sizes import GPT, read_sizes
from quatom.families.spec import FeedForward, ModelConfig, Norm, Rope


def read(keys: Keys) -> ModelConfig:
    """What a GPTJForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    keys.only("rotary", True)
    keys.only("scale_attn_weights", True)
    sizes = read_sizes(keys, max_position=2048, spellings=GPT)
    keys.only("num_key_value_heads", sizes.heads)
    keys.only("head_dim", sizes.hidden // sizes.heads)
    rope = Rope(theta=10_000.0, dim=keys.integer("rotary_dim", default=64), interleaved=True)
    return decoder(
        keys,
        sizes,
        Rotary((rope,) * sizes.layers, sizes.max_position),
        family="gptj",
        norm=Norm(kind="layer", eps=keys.positive("layer_norm_epsilon", default=1e-5), bias=True),
        feed_forward=FeedForward(
            size=keys.integer("n_inner", default=4 * sizes.hidden),
            activation=activation(keys, "activation_function", default="gelu_new"),
            gated=False,
        ),
        mlp_bias=True,
        linears={
            "qkv": ("attn.q_proj", "attn.k_proj", "attn.v_proj"),
            "o": ("attn.out_proj",),
            "gate_up": ("mlp.fc_in",),
            "down": ("mlp.fc_out",),
        },
        norms={"attention": "ln_1"},
        parallel=True,
        layer_prefix="transformer.h.",
        embedding_name="transformer.wte.weight",
        final_norm_name="transformer.ln_f",
        head_bias=True,
    )


GPTJ = Family(
    name="gptj",
    architectures=("GPTJForCausalLM",),
    model_type="gptj",
    models="GPT-J 6B",
    read=read,
)
