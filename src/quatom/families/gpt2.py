"""GPT-2: learned positions, LayerNorm, biases, GELU, no gate; transposed weights in files."""

from dataclasses import replace

from quatom.families.decoder import Family, decoder
from quatom.families.gpt import gpt_parts
from quatom.families.keys import Keys
from quatom.families.rope import Rotary
from quatom.families.sizes import GPT, fixed_heads, read_sizes
from quatom.families.spec import Layer, Linear, ModelConfig, Positions, Spelling


def read(keys: Keys) -> ModelConfig:
    """What a GPT2LMHeadModel computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    keys.only("scale_attn_by_inverse_layer_idx", False)
    config = gpt(keys, family="gpt2", kv_heads=None, default="gelu_new")
    return replace(config, layers=tuple(_transposed(layer) for layer in config.layers))


def gpt(keys: Keys, *, family: str, kv_heads: int | None, default: str) -> ModelConfig:
    """What GPT-2 and GPT-BigCode share.

    Args:
        keys: of config.json.
        family: Name in the registry.
        kv_heads: Heads of K and V; None: as many as query heads.
        default: of activation_function.

    Raises:
        ModelError: a key is missing or not supported.
    """
    sizes = read_sizes(keys, max_position=1024, kv_heads=kv_heads, spellings=GPT)
    fixed_heads(keys, sizes, kv_heads=kv_heads)
    keys.only("n_ctx", sizes.max_position)
    keys.only("n_special", 0)
    keys.ignore("output_past", "predict_special_tokens")  # of the first files; no class reads them
    return decoder(
        keys,
        sizes,
        Rotary((None,) * sizes.layers, sizes.max_position),
        family=family,
        attention_bias=True,
        output_bias=True,
        linears={
            "qkv": ("attn.c_attn",),
            "o": ("attn.c_proj",),
            "gate_up": ("mlp.c_fc",),
            "down": ("mlp.c_proj",),
        },
        norms={"attention": "ln_1", "feed_forward": "ln_2"},
        tied=True,
        positions=Positions(name="transformer.wpe.weight", rows=sizes.max_position),
        **gpt_parts(keys, sizes, default=default),
    )


def _transposed(layer: Layer) -> Layer:
    """The layer whose linears have names of their own, and transposed weights in files."""

    def own(linear: Linear) -> Linear:
        weight = Spelling((f"{linear.name}.weight",), transposed=True)
        bias = Spelling((f"{linear.name}.bias",))
        name = f"{linear.name}.linear"
        return replace(linear, name=name, spellings=(weight,), bias_spellings=(bias,))

    linears = {site: tuple(own(one) for one in layer.linears[site]) for site in layer.linears}
    return replace(layer, linears=linears)


GPT2 = Family(
    name="gpt2",
    architectures=("GPT2LMHeadModel",),
    model_type="gpt2",
    models="GPT-2, DistilGPT2, Cerebras-GPT",
    read=read,
)
