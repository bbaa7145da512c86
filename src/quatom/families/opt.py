"""OPT: learned positions instead of rotary embedding, LayerNorm, ReLU, no gate."""

from quatom.families.decoder import Family, activation, decoder
from quatom.families.keys import Keys
from quatom.families.rope import Rotary
from quatom.families.sizes import fixed_heads, read_sizes
from quatom.families.spec import FeedForward, ModelConfig, Norm, Positions

_OFFSET = 2


def read(keys: Keys) -> ModelConfig:
    """What an OPTForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported; norms after attention (OPT-350M), embeddings
            of another width than the layers and norms without weights are not.
    """
    keys.only("do_layer_norm_before", True)
    keys.only("_remove_final_layer_norm", False)
    keys.only("layer_norm_elementwise_affine", True)
    # What Galactica's files say besides.
    keys.only("learned_embeddings", True)
    keys.only("scale_embeddings", False)
    sizes = read_sizes(keys, max_position=2048)
    keys.only("word_embed_proj_dim", sizes.hidden)
    fixed_heads(keys, sizes)
    bias = keys.flag("enable_bias", default=True)
    return decoder(
        keys,
        sizes,
        Rotary((None,) * sizes.layers, sizes.max_position),
        family="opt",
        norm=Norm(kind="layer", eps=1e-5, bias=True),
        feed_forward=FeedForward(
            size=keys.integer("ffn_dim"),
            activation=activation(keys, "activation_function", default="relu"),
            gated=False,
        ),
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        linears={
            "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "o": ("self_attn.out_proj",),
            "gate_up": ("fc1",),
            "down": ("fc2",),
        },
        norms={"attention": "self_attn_layer_norm", "feed_forward": "final_layer_norm"},
        tied=True,
        positions=Positions(
            name="model.decoder.embed_positions.weight",
            rows=sizes.max_position + _OFFSET,
            offset=_OFFSET,
        ),
        layer_prefix="model.decoder.layers.",
        embedding_name="model.decoder.embed_tokens.weight",
        final_norm_name="model.decoder.final_layer_norm",
    )


OPT = Family(
    name="opt",
    architectures=("OPTForCausalLM",),
    model_type="opt",
    models="OPT, but for OPT-350M",
    read=read,
)
