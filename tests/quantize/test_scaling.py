"""Factors of input channels: each method by its formula, and a block that computes the same."""

from dataclasses import replace

import pytest
import torch

from quatom.checkpoint.reader import open_source
from quatom.errors import RecipeError
from quatom.loading import load_float_layer
from quatom.modeling.build import build_block
from quatom.modeling.rotary import RotaryTables
from quatom.numerics.clipping import SEARCH_RATIOS, weight_scales
from quatom.numerics.formats import get_format
from quatom.plan import plan
from quatom.presets import PRESETS
from quatom.quantize.measure import measure_channels
from quatom.quantize.statistics import run_block
from quatom.quantize.transforms import transforms_of
from quatom.quantize.transforms.awq import search_factors
from quatom.quantize.transforms.scaling import (
    balanced_factors,
    can_fold,
    fold_division,
    scale_channels,
    smooth_factors,
)
from quatom.recipe import KVSpec, Recipe, ScalingSpec
from tests.families.models import save_tiny

CPU = torch.device("cpu")
METHODS = {
    "balanced": replace(PRESETS["w4a16"], channel_scaling=ScalingSpec(method="balanced")),
    "smoothquant": PRESETS["smoothquant-w8a8"],
    "awq": PRESETS["awq-w4a16"],
}
# A gated and an ungated feed-forward layer, biases, norms of 1 + w, layer norms, no norm in front,
# values shared by query heads and one per head, one norm for attention and feed-forward layer.
FAMILIES = ("llama", "qwen2", "gemma3", "olmo2", "opt", "starcoder2", "stablelm", "cohere", "phi")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    return {name: open_source(save_tiny(folder / name, name)) for name in FAMILIES}


def measure(source, recipe, hidden):
    """First layer, its output on `hidden`, its statistics and its plan."""
    layer = plan(source.model_config, recipe).layers[0]
    weights = load_float_layer(source, layer, CPU, torch.float32)
    floating = plan(source.model_config, PRESETS["fp16"]).layers[0]
    module, length = build_block(floating, weights), hidden.shape[1]
    rotary = RotaryTables(source.model_config, length)
    output, statistics = measure_channels(module, hidden, rotary, recipe)

    def run(changed):
        return run_block(build_block(floating, changed), hidden, rotary)

    return layer, weights, statistics, output, run


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_the_block_computes_the_same(method, family, sources):
    source, recipe = sources[family], METHODS[method]
    size = source.model_config.hidden_size
    hidden = torch.randn(2, 20, size, generator=torch.Generator().manual_seed(0))
    layer, weights, statistics, want, run = measure(source, recipe, hidden)
    scaled = scale_channels(layer, weights, statistics, recipe.channel_scaling)
    for name, held in scaled.sites.items():
        shared = name == "gate_up" and layer.spec.shares_norm  # divided with q, k and v
        folded = (can_fold(layer, name) or shared) and (
            method != "smoothquant" or name in ("qkv", "gate_up")
        )
        assert (held.divided_by is not None) == folded, name
        if folded:
            columns = weights.sites[name].weight
            ratio = held.weight[-1] / columns[-1]
            last = scaled.sites[name].divided_by
            if name == "gate_up" or name == "qkv":  # their last row may be divided for another
                ratio = ratio / (ratio / last).median()
            torch.testing.assert_close(ratio, last, rtol=1e-4, atol=0)
    got = run(scaled)
    # Float32 rounding of norms, factors and products, some 2**-22 each.
    assert (got - want).abs().max() <= 2e-5 * want.abs().max()


def test_what_cannot_divide_is_left_alone(sources):
    def sites(family, cache=PRESETS["fp16"].kv_cache):
        recipe = replace(METHODS["balanced"], kv_cache=cache)
        layer = plan(sources[family].model_config, recipe).layers[0]
        return [name for name in layer.sites if can_fold(layer, name)]

    assert sites("llama") == ["qkv", "gate_up", "down"]  # two query heads share values
    assert sites("olmo2") == ["o", "down"]  # nothing normalizes the inputs; every head its values
    assert sites("opt") == ["qkv", "o", "gate_up", "down"]  # ReLU passes positive factors
    assert sites("cohere") == ["qkv", "o", "down"]  # gate and up share what q, k and v read
    rotated = KVSpec(format="float16", value_rotation="hadamard")
    assert sites("opt", rotated) == ["qkv", "gate_up", "down"]
    assert "down" not in sites("starcoder2")  # GELU does not
    layer = plan(sources["llama"].model_config, PRESETS["w4a16"]).layers[0]
    clamped = replace(layer.spec.feed_forward, activation="clamped_swiglu")
    layer = replace(layer, spec=replace(layer.spec, feed_forward=clamped))
    assert not can_fold(layer, "down")  # 1 is added to up, which is clamped before
    layer = plan(sources["opt"].model_config, PRESETS["w4a16"]).layers[0]
    squared = replace(layer.spec.feed_forward, activation="relu2")
    layer = replace(layer, spec=replace(layer.spec, feed_forward=squared))
    assert not can_fold(layer, "down")  # it squares factors


def test_orders_are_those_of_the_divided_inputs(sources):
    recipe = Recipe(channel_scaling=ScalingSpec(method="balanced"))
    source = sources["llama"]
    hidden = torch.randn(2, 20, 256, generator=torch.Generator().manual_seed(0))
    layer, weights, statistics, _, _ = measure(source, recipe, hidden)
    arranged = transforms_of(recipe).finish(layer, weights, statistics)
    scaled = scale_channels(layer, weights, statistics, recipe.channel_scaling)
    for name, held in arranged.sites.items():
        divided = scaled.sites[name].divided_by
        squares = statistics[f"second_moment.{name}"]
        left = squares if divided is None else squares / divided.square()
        assert (left[held.order].diff() >= 0).all(), name


def test_balanced_factors_by_hand():
    weight = torch.tensor([[1.0, 2.0, 0.0, 4.0], [1.0, 2.0, 0.0, 4.0]])
    squares = torch.tensor([16.0, 4.0, 9.0, 16.0])
    # E[x**2] / E[w**2]: 16, 1, none, 1; their geometric mean is 16**(1/3).
    want = torch.tensor([16.0, 1.0, 1.0, 1.0]) / 16 ** (1 / 3)
    want[2] = 1.0  # weights that are all zero
    for strength in (0.5, 1.0):
        got = balanced_factors(squares, weight, strength)
        torch.testing.assert_close(got, want ** (strength / 4))
    assert torch.equal(balanced_factors(torch.zeros(4), weight, 1.0), torch.ones(4))


def test_at_full_balance_both_errors_weigh_alike():
    """Rounding leaves input x a share of its scale, and weight w of its: l**4 = E[x2] / E[w2]."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(50, 30, generator=generator) * torch.rand(30, generator=generator)
    squares = torch.rand(30, generator=generator) * 10
    factor = balanced_factors(squares, weight, 1.0)

    def total(f):  # one step for all inputs, one for all weights: sum of x2 * sum of squares of w
        return float((squares / f**2).sum() * (weight.square().sum(dim=0) * f**2).sum())

    assert all(total(factor) <= total(factor**p) for p in (0.0, 0.9, 1.1, 2.0))


def test_smoothing_by_hand():
    weight = torch.tensor([[1.0, -4.0, 0.0], [-2.0, 1.0, 0.0]])
    got = smooth_factors(torch.tensor([8.0, 1.0, 3.0]), weight, 0.5)
    torch.testing.assert_close(got, torch.tensor([2.0, 0.5, 1.0]))
    got = smooth_factors(torch.tensor([8.0, 0.0, 3.0]), weight, 1.0)
    torch.testing.assert_close(got, torch.tensor([8.0, 1.0, 1.0]))


def test_awq_finds_the_power_of_least_error(sources):
    """Every power again, on the inputs themselves instead of their second moments."""
    recipe = PRESETS["awq-w4a16"]
    site = plan(sources["llama"].model_config, recipe).layers[0].sites["down"]
    generator = torch.Generator().manual_seed(2)
    channels = site.channels
    x = torch.randn(300, channels, generator=generator)
    x = x * torch.logspace(-1.5, 1.0, channels)[torch.randperm(channels, generator=generator)]
    weight = torch.randn(site.rows, channels, generator=generator)
    got = search_factors(site, weight, x.abs().sum(dim=0), x.t() @ x, 1.0)
    errors, tried = [], []
    for step in range(20):
        factor = x.abs().mean(dim=0) ** (step / 20)
        factor = factor / (factor.max() * factor.min()).sqrt()
        scaled, rounded = weight * factor, []
        for part in scaled.split(128, dim=1):
            scale = (part.abs().amax(dim=1, keepdim=True) / 7).half().float()
            rounded.append((part / scale).round().clamp(-8, 7) * scale)
        errors.append(float(((torch.cat(rounded, dim=1) / factor - weight) @ x.t()).square().sum()))
        tried.append(factor)
    best = min(range(20), key=errors.__getitem__)
    assert 0 < best < 19
    torch.testing.assert_close(got, tried[best], rtol=1e-4, atol=0)
    assert errors[best] < 0.8 * errors[0]


def test_clipping_by_the_groups_share_of_the_output():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(200, 32, generator=generator) @ torch.randn(32, 32, generator=generator)
    weight = torch.randn(6, 32, generator=generator)
    fmt = get_format("int4")
    got = weight_scales(weight, fmt, ratios=SEARCH_RATIOS, importance=x.t() @ x)
    for row, scale in zip(weight, got, strict=True):
        losses = {}
        for ratio in SEARCH_RATIOS:
            step = (row.abs().max() * ratio / 7).half().float()
            losses[float(step)] = (((row / step).round().clamp(-8, 7) * step - row) @ x.t()).norm()
        assert losses[float(scale)] <= min(losses.values()) * (1 + 1e-5)


def test_scaling_that_cannot_be_is_refused():
    awq = ScalingSpec(method="awq", strength=1.0)
    with pytest.raises(RecipeError, match=r"'awq' searches .* outliers.channels 0"):
        Recipe(channel_scaling=awq)
    with pytest.raises(RecipeError, match=r"channel_scaling.method .* quantized weights.format"):
        replace(PRESETS["fp16"], channel_scaling=ScalingSpec(method="balanced"))
    with pytest.raises(RecipeError, match=r"channel_scaling.strength must be in \(0, 1\]"):
        ScalingSpec(method="balanced", strength=1.5)
    assert PRESETS["smoothquant-w8a8"].needs_calibration
    assert not PRESETS["smoothquant-w8a8"].needs_moments
    assert PRESETS["awq-w4a16"].needs_moments


def test_columns_take_back_what_a_rounded_norm_was_really_divided_by(sources):
    source, recipe = sources["gemma3"], METHODS["balanced"]
    layer = plan(source.model_config, recipe).layers[0]
    weights = load_float_layer(source, layer, CPU, torch.bfloat16)
    site = layer.sites["qkv"]
    factor = torch.rand(site.channels, generator=torch.Generator().manual_seed(4)) + 0.5
    folded = fold_division(layer, weights, "qkv", factor)
    before, after = (w.norms["attention"].weight for w in (weights, folded))
    assert after.dtype == torch.bfloat16
    exact, offset = folded.sites["qkv"].divided_by, layer.spec.norms["attention"].weight_offset
    # Near the factor asked for: bfloat16 keeps 8 significant bits of w, beside an offset of 1.
    torch.testing.assert_close(exact, factor, rtol=2**-6, atol=0)
    assert not torch.equal(exact, factor)
    product = (after.float() + offset) * exact
    torch.testing.assert_close(product, before.float() + offset, rtol=1e-6, atol=0)
