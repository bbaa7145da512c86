"""Keys that say once more, under another name, what a family or other keys say.

Released files hold many: "bias": false, "activation": "swiglu", "use_rmsnorm": true. No class of
transformers reads them there. One that agrees with what the model computes is passed over, one
that disagrees is refused.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from quatom.families.decoder import ACTIVATIONS
from quatom.families.keys import Keys
from quatom.families.spec import Attention, FeedForward, Layer, ModelConfig, SiteName

_GATED = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu", "relu": "reglu"}
"""Activation -> what a feed-forward layer with a gate is called, too."""
_NORMS = {
    "rms": ("rms", "rmsnorm", "rms_norm", "RMSNorm"),
    "layer": ("layer", "layernorm", "layer_norm", "LayerNorm"),
}


def check_restated(keys: Keys, config: ModelConfig) -> None:
    """Compare what no family read with what the model computes.

    Args:
        keys: of config.json.
        config: what a family read from them.

    Raises:
        ModelError: a key disagrees.
    """
    if keys.unread("use_sliding_window") is False:
        keys.ignore("sliding_window")
    for names, values in _facts(config):
        for name in names.split():
            if values and keys.unread(name) is not None:
                keys.only(name, *values)


def _facts(config: ModelConfig) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Names of a key, and the values that agree; none where layers differ."""

    def every(of: Callable[[Layer], Any]) -> tuple[Any, ...]:
        found = {of(layer) for layer in config.layers}
        return tuple(found) if len(found) == 1 else ()

    def biased(*sites: SiteName) -> tuple[bool, ...]:
        flags = {
            linear.bias
            for layer in config.layers
            for site in sites or layer.sites
            for linear in layer.linears.get(site, ())
        }
        return tuple(flags) if len(flags) == 1 else ()

    yield "bias use_bias enable_bias add_bias_linear", biased()
    yield "qkv_bias use_qkv_bias add_qkv_bias attention_qkv_bias", biased("qkv")
    yield "ffn_bias use_mlp_bias", biased("gate_up", "down", "experts_gate_up", "experts_down")
    for normed in every(lambda x: x.attention.qk_norm is not None):
        yield "qk_norm use_qk_norm qk_layernorm use_qk_layernorm", (normed,)
    yield "use_rmsnorm rms_norm", (config.final_norm.kind == "rms",)
    yield "norm_type normalization_type normalization_function", _NORMS[config.final_norm.kind]
    yield "use_alibi alibi", (False,)

    for feed in every(_feed):
        names = [name for name, kind in ACTIVATIONS.items() if kind == feed.activation]
        names += [_GATED.get(feed.activation, "")] if feed.gated else []
        yield "activation activation_function hidden_act hidden_activation", tuple(names)
        yield "use_gated_activation gated_mlp", (feed.gated,)
    for size in every(lambda x: x.experts is None and x.feed_forward and x.feed_forward.size):
        yield "ffn_dim ffn_hidden_size n_inner d_ff", (size,) if size else ()
    for sparse in every(lambda x: x.experts is not None):
        yield "is_moe moe use_moe", (sparse,)
        yield "num_experts num_local_experts n_routed_experts", () if sparse else (0,)

    yield "use_parallel_block use_parallel_residual parallel_attn", every(lambda x: x.parallel)
    yield "use_embedding_sharing tie_embeddings", (config.tie_word_embeddings,)
    turning = {(x.rope.dim, x.head_dim) for x in map(_attention, config.layers) if x.rope}
    for dim, size in turning if len(turning) == 1 else ():
        yield "rotary_pct rope_pct rope_percent rope_percentage rotary_percent", (dim / size,)
        yield "rotary_dim rotary_ndims", (dim,)

    yield "embedding_multiplier", (config.embedding_multiplier,)
    yield "attention_multiplier", every(lambda x: x.attention.scale)
    yield "residual_multiplier", every(lambda x: x.residual_multiplier)
    yield "logits_scaling", (config.logits_divisor,)

    yield "d_model n_embd n_embed", (config.hidden_size,)
    yield "n_layer n_layers num_layers", (config.num_layers,)
    yield "n_head n_heads num_heads", every(lambda x: x.attention.num_heads)
    yield "n_head_kv n_kv_heads num_kv_heads", every(lambda x: x.attention.num_kv_heads)
    yield "head_size kv_channels", every(lambda x: x.attention.head_dim)
    yield "padded_vocab_size", (config.vocab_size,)


def _attention(layer: Layer) -> Attention:
    return layer.attention


def _feed(layer: Layer) -> FeedForward | None:
    """What a layer's activation is, whatever its size."""
    feed = layer.feed_forward
    if feed is None and layer.experts is not None:
        feed = layer.experts.feed_forward
    return None if feed is None else replace(feed, size=1)
