"""From keys of config.json to layers: what families that resemble Llama share.

A family reads its sizes, windows and rotary embedding, and calls `decoder`; it says in arguments
what is its own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from quatom.errors import ModelError
from quatom.families.keys import Keys
from quatom.families.rope import Rotary
from quatom.families.sizes import Sizes, same_window
from quatom.families.spec import (
    Activation,
    Attention,
    Experts,
    FeedForward,
    HeadNormAxis,
    Layer,
    Linear,
    ModelConfig,
    Norm,
    NormName,
    QueryGrowth,
    SiteName,
)

LINEARS: Mapping[SiteName, tuple[str, ...]] = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""Llama's names. One name alone for qkv or for a gated gate_up means one fused linear."""
NORMS_BEFORE: Mapping[NormName, str] = {
    "attention": "input_layernorm",
    "feed_forward": "post_attention_layernorm",
}
"""Llama's names."""
NORMS_AFTER: Mapping[NormName, str] = {
    "attention_output": "post_attention_layernorm",
    "feed_forward_output": "post_feedforward_layernorm",
}
"""OLMo-2's names."""

ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    # All of these are the tanh approximation; they differ in the digits of sqrt(2 / pi).
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
"""What files call an activation -> what it computes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """An entry of the registry."""

    name: str
    architectures: tuple[str, ...]
    """Names in `architectures` of config.json."""
    model_type: str
    saved_as: str | None = None
    """What transformers writes in `architectures` where it runs the class of another family."""
    models: str
    """Released models, for the table in the docs."""
    read: Callable[[Keys], ModelConfig]


def read_feed_forward(
    keys: Keys, *names: str, default: str = "silu", gated: bool = True
) -> FeedForward:
    """Feed-forward layers of `intermediate_size`.

    Args:
        keys: of config.json.
        names: Spellings of the key of the activation; none: hidden_act.
        default: Activation where config.json names none.
        gated: As in `FeedForward`.

    Raises:
        ModelError: the activation is not supported.
    """
    size = keys.integer("intermediate_size")
    return FeedForward(size=size, activation=activation(keys, *names, default=default), gated=gated)


@dataclass(frozen=True, slots=True, kw_only=True)
class Feed:
    """What follows attention in a layer: a dense feed-forward layer, experts, or both."""

    dense: FeedForward | None
    """The feed-forward layer; beside experts the shared expert."""
    experts: Experts | None = None
    linears: Mapping[SiteName, tuple[Linear, ...]]
    """Of the sites that it has."""


def activation(keys: Keys, *names: str, default: str) -> Activation:
    """The activation under `names`, or under hidden_act.

    Raises:
        ModelError: it is not supported.
    """
    names = names or ("hidden_act",)
    name = keys.text(*names, default=default)
    if name not in ACTIVATIONS:
        raise ModelError(
            f"config key {names[0]} = {name!r} is not supported; supported: "
            f"{', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def decoder(
    keys: Keys,
    sizes: Sizes,
    rotary: Rotary,
    *,
    family: str,
    norm: Norm,
    feed_forward: FeedForward | Sequence[Feed],
    windows: Sequence[int | None] | None = None,
    scale: float | None = None,
    query_growth: QueryGrowth | None = None,
    score_softcap: float | None = None,
    sinks: bool = False,
    qk_norm: Norm | None = None,
    qk_norm_axis: HeadNormAxis = "head",
    attention_bias: bool = False,
    output_bias: bool = False,
    mlp_bias: bool = False,
    linears: Mapping[SiteName, tuple[str, ...]] = LINEARS,
    norms: Mapping[NormName, str] = NORMS_BEFORE,
    residual_multiplier: float = 1.0,
    parallel: bool = False,
    rows_by_group: bool = False,
    tied: bool = False,
    **model: Any,
) -> ModelConfig:
    """A decoder whose layers differ in window, rotary embedding and feed-forward layer alone.

    Args:
        keys: of config.json; all of them must be understood when this returns.
        sizes: from `read_sizes`.
        rotary: from `quatom.families.rope`, one entry per layer.
        family: Name in the registry.
        norm: Every norm outside attention.
        feed_forward: of every layer, or what each has (`quatom.families.experts`).
        windows: Window of each layer; None: none has one.
        scale: Factor of scores; None: head_dim ** -0.5.
        query_growth: As in `Attention`.
        score_softcap: Soft-cap of attention scores.
        sinks: As in `Attention`.
        qk_norm: Norm of q and k.
        qk_norm_axis: As in `Attention`.
        attention_bias: q, k and v have a bias.
        output_bias: o has a bias.
        mlp_bias: gate, up and down have a bias.
        linears: Names of the linears of each site.
        norms: Names of the norms of a layer; those that are missing do not exist.
        residual_multiplier: As in `Layer`.
        parallel: As in `Layer`.
        rows_by_group: As in `Attention`.
        tied: Default of tie_word_embeddings.
        model: Other fields of `ModelConfig`.

    Raises:
        ModelError: sizes do not fit each other.
    """
    plain = Attention(
        num_heads=sizes.heads,
        num_kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        scale=sizes.head_dim**-0.5 if scale is None else scale,
        query_growth=query_growth,
        logit_softcap=score_softcap,
        sinks=sinks,
        rows_by_group=rows_by_group,
        qk_norm=qk_norm,
        qk_norm_axis=qk_norm_axis,
    )
    qkv_rows = (plain.q_size, plain.kv_size, plain.kv_size)
    attention_linears: dict[SiteName, tuple[Linear, ...]] = {
        "qkv": named(linears["qkv"], qkv_rows, attention_bias),
        "o": named(linears["o"], (sizes.hidden,), output_bias),
    }
    if isinstance(feed_forward, FeedForward):
        feed = dense_feed(feed_forward, sizes.hidden, linears, bias=mlp_bias)
        feed_forward = (feed,) * sizes.layers

    if windows is None:
        windows = same_window(keys, sizes.layers, None)

    def attention(rope: Any, window: int | None) -> Attention:
        # A window as long as the longest sequence hides nothing.
        hides = window is not None and window < rotary.max_position
        return replace(plain, rope=rope, window=window if hides else None)

    layers = tuple(
        Layer(
            attention=attention(rope, window),
            feed_forward=feed.dense,
            experts=feed.experts,
            linears={**attention_linears, **feed.linears},
            norms=dict.fromkeys(norms, norm),
            norm_names=norms,
            residual_multiplier=residual_multiplier,
            parallel=parallel,
        )
        for rope, window, feed in zip(rotary.ropes, windows, feed_forward, strict=True)
    )
    return ModelConfig(
        family=family,
        vocab_size=keys.integer("vocab_size"),
        hidden_size=sizes.hidden,
        layers=layers,
        final_norm=norm,
        max_position=rotary.max_position,
        tie_word_embeddings=keys.flag("tie_word_embeddings", default=tied),
        bos_token_id=keys.token("bos_token_id"),
        eos_token_ids=keys.tokens("eos_token_id"),
        **model,
    )


def named(names: Sequence[str], rows: Sequence[int], bias: bool = False) -> tuple[Linear, ...]:
    """Linears of these rows; one name alone is one linear with the rows of all."""
    if len(names) == 1:
        rows = (sum(rows),)
    return tuple(
        Linear(name=name, rows=size, bias=bias) for name, size in zip(names, rows, strict=True)
    )


def dense_feed(
    feed_forward: FeedForward,
    hidden_size: int,
    names: Mapping[SiteName, tuple[str, ...]] = LINEARS,
    *,
    bias: bool = False,
) -> Feed:
    """A layer without routed experts."""
    halves = (feed_forward.size,) * (2 if feed_forward.gated else 1)
    return Feed(
        dense=feed_forward,
        linears={
            "gate_up": named(names["gate_up"], halves, bias),
            "down": named(names["down"], (hidden_size,), bias),
        },
    )
