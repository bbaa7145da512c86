"""GPT-Neo: learned positions, scores without a factor, windows in layers that a list names."""

from typing import Any

from quatom.errors import ModelError
from quatom.families.decoder import Family, decoder
from quatom.families.gpt import gpt_parts
from quatom.families.keys import Keys
from quatom.families.rope import Rotary
from quatom.families.sizes import fixed_heads, read_sizes
from quatom.families.spec import ModelConfig, Positions

_SIZES = {"num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"}
_TYPES: Any = [[["global", "local"], 12]]


def read(keys: Keys) -> ModelConfig:
    """What a GPTNeoForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    sizes = read_sizes(keys, max_position=2048, spellings=_SIZES)
    fixed_heads(keys, sizes)
    window = keys.integer("window_size", default=256)
    return decoder(
        keys,
        sizes,
        Rotary((None,) * sizes.layers, sizes.max_position),
        family="gpt_neo",
        windows=[window if kind == "local" else None for kind in _types(keys, sizes.layers)],
        scale=1.0,
        output_bias=True,
        linears={
            "qkv": ("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"),
            "o": ("attn.attention.out_proj",),
            "gate_up": ("mlp.c_fc",),
            "down": ("mlp.c_proj",),
        },
        norms={"attention": "ln_1", "feed_forward": "ln_2"},
        tied=True,
        positions=Positions(name="transformer.wpe.weight", rows=sizes.max_position),
        **gpt_parts(keys, sizes, inner="intermediate_size"),
    )


def _types(keys: Keys, layers: int) -> list[str]:
    """What each layer is: [[["global", "local"], 2]] means these two, twice."""
    runs = keys.value("attention_types") or _TYPES
    try:
        # A damaged number of repetitions must not fill the memory.
        types = [kind for kinds, times in runs for _ in range(min(times, layers)) for kind in kinds]
    except (TypeError, ValueError):
        types = []
    if len(types) != layers or any(kind not in ("global", "local") for kind in types):
        raise ModelError(
            f"config key attention_types must give {layers} layers, each global or local, as lists "
            f"of types and repetitions; it gives {len(types)}"
        )
    keys.only("attention_layers", types)
    return types


GPT_NEO = Family(
    name="gpt_neo",
    architectures=("GPTNeoForCausalLM",),
    model_type="gpt_neo",
    models="GPT-Neo 125M, 1.3B and 2.7B",
    read=read,
)
