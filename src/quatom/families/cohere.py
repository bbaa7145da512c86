"""Cohere: attention beside the feed-forward layer, one LayerNorm without bias for both."""

from collections.abc import Sequence

from quatom.families.decoder import Family, decoder, read_feed_forward
from quatom.families.keys import Keys
from quatom.families.rope import Rotary, one_rope
from quatom.families.sizes import Sizes, periodic_layer_types, read_sizes, windows
from quatom.families.spec import ModelConfig, Norm


def read(keys: Keys) -> ModelConfig:
    """What a CohereForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    sizes = read_sizes(keys, max_position=8192)
    rotary, normalized = _rotary(keys, sizes, 500_000.0), keys.flag("use_qk_norm")
    return _read(keys, sizes, rotary, "cohere", normalized=normalized)


def read_cohere2(keys: Keys) -> ModelConfig:
    """What a Cohere2ForCausalLM computes: windows, and no rotary embedding in the other layers.

    Raises:
        ModelError: a key is missing or not supported.
    """
    sizes = read_sizes(keys, max_position=8192)
    keys.only("head_dim", sizes.hidden // sizes.heads)
    # What the released files say besides.
    keys.only("position_embedding_type", "rope_gptj")
    keys.only("order_of_interleaved_layers", "local_attn_first")
    keys.ignore("use_parallel_embedding")
    every = keys.integer("sliding_window_pattern", "layer_switch", default=4)
    types = periodic_layer_types(keys, sizes.layers, every=every)
    every_window = windows(types, keys.integer_or_none("sliding_window", default=4096))
    shared = _rotary(keys, sizes, 10_000.0)
    ropes = tuple(
        rope if window is not None else None
        for rope, window in zip(shared.ropes, every_window, strict=True)
    )
    return _read(keys, sizes, Rotary(ropes, shared.max_position), "cohere2", every_window)


def _rotary(keys: Keys, sizes: Sizes, theta: float) -> Rotary:
    return one_rope(keys, sizes, theta=theta, interleaved=True)


def _read(
    keys: Keys,
    sizes: Sizes,
    rotary: Rotary,
    family: str,
    own_windows: Sequence[int | None] | None = None,
    *,
    normalized: bool = False,
) -> ModelConfig:
    bias = keys.flag("attention_bias")
    norm = Norm(kind="layer", eps=keys.positive("layer_norm_eps", default=1e-5))
    return decoder(
        keys,
        sizes,
        rotary,
        family=family,
        norm=norm,
        feed_forward=read_feed_forward(keys),
        windows=own_windows,
        qk_norm=norm if normalized else None,
        qk_norm_axis="each",
        attention_bias=bias,
        output_bias=bias,
        norms={"attention": "input_layernorm"},
        parallel=True,
        tied=True,
        logits_divisor=1.0 / keys.positive("logit_scale", default=0.0625),
    )


COHERE = Family(
    name="cohere",
    architectures=("CohereForCausalLM",),
    model_type="cohere",
    models="Command R and R+, Aya 23, Aya Expanse",
    read=read,
)
COHERE2 = Family(
    name="cohere2",
    architectures=("Cohere2ForCausalLM",),
    model_type="cohere2",
    models="Command R7B, Command A, Tiny Aya",
    read=read_cohere2,
)
