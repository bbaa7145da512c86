"""Layers that the decoder cannot compute are refused."""

from dataclasses import replace

import pytest

from quatom.errors import ModelError
from quatom.families.registry import read_config
from tests.families.models import tiny_config


def layer_of(name):
    return read_config(tiny_config(name).to_dict()).layers[0]


@pytest.mark.parametrize("family", ["mixtral", "glm4_moe"])
def test_experts_do_not_run_beside_attention(family):
    layers = read_config(tiny_config(family).to_dict()).layers
    layer = next(layer for layer in layers if layer.experts is not None)
    with pytest.raises(ModelError, match="experts beside attention, in one layer"):
        replace(layer, parallel=True)


@pytest.mark.parametrize(
    ("family", "shares"),
    [("cohere", True), ("gpt_neox", False), ("gpt_neox-sequential", False), ("llama", False)],
)
def test_one_norm_for_both_is_a_parallel_layer_without_a_second_one(family, shares):
    assert layer_of(family).shares_norm is shares
