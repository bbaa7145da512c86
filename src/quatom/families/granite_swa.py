"""Granite with windows: sinks, a window in three layers of four, a rotary base per layer.

Its layers are dense, or those of Granite with experts and a shared expert.
"""

from dataclasses import replace
from typing import Any

from quatom.errors import ModelError
from quatom.families.decoder import Family
from quatom.families.granite import multipliers
from quatom.families.granite_moe import shared_feeds
from quatom.families.keys import Keys
from quatom.families.llama import llama
from quatom.families.rope import Rotary, one_rope
from quatom.families.sizes import Sizes, periodic_layer_types, read_sizes, windows
from quatom.families.spec import ModelConfig


def read(keys: Keys) -> ModelConfig:
    """What a GraniteSWAForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    sizes = read_sizes(keys, max_position=8192, kv_heads=4)
    return _read(keys, sizes, family="granite_swa", eps=1e-5, tied=True)


def read_experts(keys: Keys) -> ModelConfig:
    """What a GraniteMoeSWAForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    keys.only("mlp_bias", False)
    sizes = read_sizes(keys, max_position=2048)
    feeds = shared_feeds(keys, sizes)
    return _read(keys, sizes, family="granitemoe_swa", eps=1e-6, feed_forward=feeds)


def _read(keys: Keys, sizes: Sizes, **own: Any) -> ModelConfig:
    types = periodic_layer_types(keys, sizes.layers, every=4, first=True)
    return llama(
        keys,
        sizes,
        _rotary(keys, sizes),
        windows=windows(types, keys.integer_or_none("sliding_window", default=128)),
        sinks=True,
        **multipliers(keys),
        **own,
    )


def _rotary(keys: Keys, sizes: Sizes) -> Rotary:
    """A base of 0 in layer_rope_theta: the layer does not turn its heads."""
    shared = one_rope(keys, sizes)
    if keys.value("layer_rope_theta") is None:
        return shared
    thetas = keys.numbers("layer_rope_theta")
    if len(thetas) != sizes.layers or min(thetas) < 0.0:
        raise ModelError(
            f"config key layer_rope_theta must list {sizes.layers} numbers of at least 0, one per "
            f"layer, got {len(thetas)}, the least of them {min(thetas, default=0.0)}"
        )
    ropes = (
        replace(rope, theta=theta) if theta and rope is not None else None
        for rope, theta in zip(shared.ropes, thetas, strict=True)
    )
    return Rotary(tuple(ropes), shared.max_position)


GRANITE_SWA = Family(
    name="granite_swa",
    architectures=("GraniteSWAForCausalLM",),
    model_type="granite_swa",
    models="Granite with windows in some layers",
    read=read,
)
GRANITE_MOE_SWA = Family(
    name="granitemoe_swa",
    architectures=("GraniteMoeSWAForCausalLM",),
    model_type="granitemoe_swa",
    models="Granite with experts, and windows in some layers",
    read=read_experts,
)
