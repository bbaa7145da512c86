"""SmolLM3: Llama with layers that have no rotary embedding."""

from quatom.families.decoder import Family, decoder, read_feed_forward
from quatom.families.keys import Keys
from quatom.families.rope import Rotary, one_rope
from quatom.families.sizes import layer_types, read_sizes, windows
from quatom.families.spec import ModelConfig, Norm


def read(keys: Keys) -> ModelConfig:
    """What a SmolLM3ForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    sizes = read_sizes(keys, max_position=32_768, kv_heads=4)
    every = keys.integer("no_rope_layer_interval", default=4)
    # Despite its name, no_rope_layers has a 1 where a layer does turn its heads.
    turns = keys.per_layer("no_rope_layers", sizes.layers, 0, 1) or tuple(
        int(layer % every != 0) for layer in range(1, sizes.layers + 1)
    )
    shared = one_rope(keys, sizes, theta=2e6)
    ropes = tuple(rope if turn else None for rope, turn in zip(shared.ropes, turns, strict=True))
    window = keys.integer_or_none("sliding_window", default=None)
    if not keys.flag("use_sliding_window"):
        window = None
    default = [
        "full_attention" if turn or window is None else "sliding_attention" for turn in turns
    ]
    bias = keys.flag("attention_bias")
    return decoder(
        keys,
        sizes,
        Rotary(ropes, shared.max_position),
        family="smollm3",
        norm=Norm(eps=keys.positive("rms_norm_eps", default=1e-6)),
        feed_forward=read_feed_forward(keys),
        windows=windows(layer_types(keys, default), window),
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=keys.flag("mlp_bias"),
        tied=True,
    )


SMOLLM3 = Family(
    name="smollm3",
    architectures=("SmolLM3ForCausalLM",),
    model_type="smollm3",
    models="SmolLM3",
    read=read,
)
