"""GPT-J: attention beside the feed-forward layer, a part of each head turns in adjacent pairs."""

from quatom.families.decoder import Family, decoder
from quatom.families.gpt import gpt_parts
from quatom.families.keys import Keys
from quatom.families.rope import Rotary
from quatom.families.sizes import GPT, fixed_heads, read_sizes
from quatom.families.spec import ModelConfig, Rope


def read(keys: Keys) -> ModelConfig:
    """What a GPTJForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    keys.only("rotary", True)
    keys.only("scale_attn_weights", True)
    sizes = read_sizes(keys, max_position=2048, spellings=GPT)
    fixed_heads(keys, sizes)
    rope = Rope(theta=10_000.0, dim=keys.integer("rotary_dim", default=64), interleaved=True)
    return decoder(
        keys,
        sizes,
        Rotary((rope,) * sizes.layers, sizes.max_position),
        family="gptj",
        linears={
            "qkv": ("attn.q_proj", "attn.k_proj", "attn.v_proj"),
            "o": ("attn.out_proj",),
            "gate_up": ("mlp.fc_in",),
            "down": ("mlp.fc_out",),
        },
        norms={"attention": "ln_1"},
        parallel=True,
        **gpt_parts(keys, sizes),
        head_bias=True,
    )


GPTJ = Family(
    name="gptj",
    architectures=("GPTJForCausalLM",),
    model_type="gptj",
    models="GPT-J 6B",
    read=read,
)
