"""Queries that grow with their position: their table, when there is none, and who reads it.

That logits are those of transformers is in tests/families/test_logits.py.
"""

from dataclasses import replace

import pytest
import torch

from quatom.checkpoint.reader import open_source
from quatom.errors import ModelError
from quatom.families.registry import read_config
from quatom.families.spec import Attention, QueryGrowth
from quatom.loading import load, load_float_layer
from quatom.modeling.build import build_block
from quatom.modeling.context import full_sequences_context
from quatom.modeling.rotary import RotaryTables
from quatom.numerics.rotary import query_scales, rotary_table
from quatom.ops.rope_append_kv.reference import rotate_halves
from quatom.plan import plan
from quatom.presets import PRESETS
from quatom.quantize.key_sensitivity import KeySensitivity
from quatom.quantize.measure import LayerStatistics
from quatom.quantize.statistics import run_block
from quatom.quantize.tuning.block import build_tuned_block
from tests.families.models import save_tiny, tiny_config

LENGTH = 16
"""Of tests/families/models.py: positions below it have the factor 1."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("growth") / "ministral3", "ministral3")


def test_the_table_is_that_of_transformers():
    from transformers.models.ministral3.modeling_ministral3 import get_llama_4_attn_scale

    ours = query_scales(QueryGrowth(beta=0.1, length=7), 100, max_length=100)
    theirs = get_llama_4_attn_scale(torch.arange(100)[None], 0.1, 7)[0, 0, :, 0]
    # Two logarithms, each within 1 ulp of a number below 4, times 0.1; and a sum below 2.
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=2 * 0.1 * 2**-22 + 2**-23)
    assert (ours[:7] == 1.0).all()
    assert (ours[7:] > 1.0).all()


def test_without_growth_nothing_is_multiplied():
    assert query_scales(None, 100, max_length=100) is None
    assert query_scales(QueryGrowth(beta=0.1, length=100), 400, max_length=100) is None
    config = read_config(tiny_config("ministral3").to_dict())
    assert RotaryTables(config, 64).query_scales(1).shape == (64,)
    assert RotaryTables(config, 64, max_length=LENGTH).query_scales(1) is None
    assert RotaryTables(read_config(tiny_config("llama").to_dict()), 64).query_scales(0) is None


def test_a_model_of_short_sequences_has_no_table(folder):
    model = load(folder).model
    assert model.rotary.query_scales(0) is not None
    model.limit_length(LENGTH)
    assert model.rotary.query_scales(0) is None
    model.limit_length(LENGTH + 1)
    assert len(model.rotary.query_scales(0)) == model.config.max_position


@pytest.mark.parametrize("growth", [{"beta": 0.0}, {"beta": -1.0}, {"length": 0}])
def test_a_growth_that_is_none_is_refused(growth):
    with pytest.raises(ModelError, match=r"growth of queries|length must be a positive integer"):
        QueryGrowth(**{"beta": 0.1, "length": 4} | growth)


@pytest.fixture(scope="module")
def first_layer(folder):
    source = open_source(folder)
    layer = plan(source.model_config, PRESETS["fp16"]).layers[0]
    weights = load_float_layer(source, layer, torch.device("cpu"), torch.float32)
    hidden = torch.randn(2, 40, 128, generator=torch.Generator().manual_seed(0))
    return layer, weights, hidden, RotaryTables(source.model_config, 40)


def test_the_tuned_block_computes_it_too(first_layer):
    layer, weights, hidden, rotary = first_layer
    want = run_block(build_block(layer, weights), hidden, rotary)
    context = full_sequences_context(2, 40, 64, hidden.device)
    tuned = build_tuned_block(layer, weights)
    output, residual = tuned(hidden.flatten(0, 1), None, context, None, rotary)
    # Sums of float32 in another order.
    torch.testing.assert_close((output + residual).view_as(want), want, rtol=1e-4, atol=1e-5)


def test_statistics_are_of_queries_as_attention_sees_them(first_layer):
    layer, _, _, rotary = first_layer
    attention = layer.spec.attention
    statistics = LayerStatistics(PRESETS["quatom-w4a4kv4"], attention, 40, rotary.of(0), sinks=None)
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(80, heads, 64, generator=generator) for heads in (2, 1, 1))
    statistics.see_heads(q, k, v)
    found = statistics.finish(statistics.sums())
    turned = [
        rotate_halves(x, *(t[:40] for t in rotary.of(0))) * rotary.query_scales(0)[:40, None, None]
        for x in q.split(40)
    ]
    want = torch.cat(turned).square().sum(dim=(0, 1)).view(2, 32).sum(dim=0) / 80
    torch.testing.assert_close(found["query_squares"][0], want, rtol=1e-5, atol=0.0)


def test_what_a_key_weighs_is_of_queries_as_attention_sees_them():
    grown = Attention(
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        scale=0.3,
        query_growth=QueryGrowth(beta=2.0, length=3),
    )
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(24, heads, 8, generator=generator) for heads in (2, 1, 1))
    tables = rotary_table(None, 8, 12, max_length=12)
    factors = query_scales(grown.query_growth, 12, max_length=12).repeat(2).view(-1, 1, 1)
    found = []
    for attention, queries in ((grown, q), (replace(grown, query_growth=None), q * factors)):
        sensitivity = KeySensitivity(attention, 12, tables)
        sensitivity.add(queries, k, v)
        found.append(sensitivity.finish())
    for name, want in found[1].items():
        torch.testing.assert_close(found[0][name], want)
