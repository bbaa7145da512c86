"""One block: statistics by hand, orders, rotations that change nothing, and rounding of a site."""

from dataclasses import replace

import pytest
import torch

from quatom.checkpoint.reader import open_source
from quatom.errors import ModelError, QuantizationError
from quatom.loading import load_float_layer
from quatom.modeling.build import build_block
from quatom.modeling.rotary import RotaryTables
from quatom.plan import plan
from quatom.presets import PRESETS
from quatom.quantize.outliers import channel_magnitudes
from quatom.quantize.rounding import round_site
from quatom.quantize.statistics import ChannelScores, SecondMoments, observe, run_block
from quatom.quantize.transforms import transforms_of
from quatom.quantize.transforms.order import choose_orders
from quatom.recipe import GPTQSpec, KVSpec, NearestSpec, OutlierSpec, WeightSpec

CPU = torch.device("cpu")
FLOAT = PRESETS["fp16"]


@pytest.fixture(scope="module")
def source(tiny_qwen2_dir):
    return open_source(tiny_qwen2_dir)


@pytest.fixture(scope="module")
def hidden():
    return torch.randn(3, 20, 256, generator=torch.Generator().manual_seed(0))


def layer_of(source, recipe=FLOAT):
    return plan(source.model_config, recipe).layers[0]


def float_layer(source):
    return load_float_layer(source, layer_of(source), CPU, torch.float32)


def run(source, weights, layer=None):
    module = build_block(layer or layer_of(source), weights)
    return lambda x: run_block(module, x, RotaryTables(source.model_config, x.shape[1]))


def test_scores_and_moments_by_hand():
    batches = [torch.tensor([[1.0, -2.0], [3.0, 0.0]]), torch.tensor([[-1.0, 1.0]])]
    squares, magnitudes = ChannelScores("second_moment"), ChannelScores("abs_mean")
    moments = SecondMoments()
    for batch in batches:
        squares.add("qkv", batch)
        magnitudes.add("qkv", batch)
        moments.add("qkv", batch)
    assert squares.sums["qkv"].tolist() == [11.0, 5.0]
    assert magnitudes.sums["qkv"].tolist() == [5.0, 3.0]
    assert moments.sums["qkv"].tolist() == [[11.0, -3.0], [-3.0, 5.0]]


def test_observers_see_every_site_and_leave(source, hidden):
    module = build_block(layer_of(source), float_layer(source))
    rotary = RotaryTables(source.model_config, 20)
    seen, heads = {}, []
    with observe(
        module,
        lambda site, x: seen.setdefault(site, x.shape),
        see_heads=lambda q, k, v: heads.append((q.shape, k.shape, v.shape)),
    ):
        run_block(module, hidden, rotary)
    assert seen == {"qkv": (60, 256), "o": (60, 256), "gate_up": (60, 256), "down": (60, 384)}
    assert heads == [((60, 4, 64), (60, 2, 64), (60, 2, 64))]
    seen.clear()
    run_block(module, hidden, rotary)
    assert not seen


def test_batches_do_not_see_each_other(source, hidden, monkeypatch):
    block = run(source, float_layer(source))
    together = block(hidden)
    monkeypatch.setattr("quatom.quantize.statistics.TOKENS_PER_BATCH", 21)
    torch.testing.assert_close(block(hidden), together, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_arranged_weights_compute_the_same_block(tensor_parallel, source, hidden):
    """Orders move columns and, for down_proj's input, rows of gate and up: no output changes."""
    recipe = replace(
        PRESETS["w4a16"],
        weights=WeightSpec(group_size=32),
        outliers=OutlierSpec(channels=32),
        tensor_parallel=tensor_parallel,
    )
    layer = plan(source.model_config, recipe).layers[0]
    weights = float_layer(source)
    generator = torch.Generator().manual_seed(1)
    scores = {
        name: torch.rand(site.channels, generator=generator) for name, site in layer.sites.items()
    }
    orders = choose_orders(layer, scores)
    assert all(not torch.equal(o, torch.arange(len(o))) for o in orders.values())
    statistics = {f"second_moment.{name}": score for name, score in scores.items()}
    arranged = transforms_of(recipe).finish(layer, weights, statistics)
    assert all(torch.equal(arranged.sites[name].order, orders[name]) for name in layer.sites)
    got = run(source, arranged, layer)(hidden)
    want = run(source, weights)(hidden)
    # Float32 sums in another order.
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_a_recipe_without_outliers_orders_nothing(source):
    layer = layer_of(source, PRESETS["w4a16"])
    assert choose_orders(layer, {"qkv": torch.rand(256)}) == {}


def test_rotated_values_compute_the_same_block(source, hidden):
    transforms = transforms_of(replace(FLOAT, kv_cache=KVSpec(value_rotation="hadamard")))
    weights = float_layer(source)
    rotated = transforms.prepare(layer_of(source), weights)
    before, after = weights.sites["qkv"], rotated.sites["qkv"]
    assert not torch.equal(after.weight, before.weight)
    assert not torch.equal(after.bias, before.bias)
    first = (4 + 2) * 64
    assert torch.equal(after.weight[:first], before.weight[:first])
    want = run(source, weights)(hidden)
    assert (run(source, rotated)(hidden) - want).abs().max() <= 1e-5 * want.abs().max()


def singular(size=256):
    """Finite and symmetric, but not positive definite whatever the damping."""
    moment = torch.eye(size)
    moment[0, 1] = moment[1, 0] = 10.0
    return moment


def round_o(source, recipe, moment):
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(2))
    site = plan(source.model_config, recipe).layers[1].sites["o"]
    return round_site(site, weight, moment, None, recipe)


def test_moments_that_cannot_be_inverted_stop_or_round_to_nearest(source):
    recipe = PRESETS["atom-w4a4kv4"]
    with pytest.raises(
        QuantizationError,
        match=r"model\.layers\.1 o: .*256 x 256.*damping \(now 0\.01\).*on_singular 'nearest'",
    ):
        round_o(source, recipe, singular())
    got = round_o(
        source,
        replace(recipe, weights=replace(recipe.weights, rounder=GPTQSpec(on_singular="nearest"))),
        singular(),
    )
    nearest = replace(recipe, weights=replace(recipe.weights, rounder=NearestSpec()))
    want = round_o(source, nearest, None)
    assert torch.equal(got.weight.values, want.weight.values)


def test_the_relative_error_is_that_of_the_output(source):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(300, 256, generator=generator)
    got = round_o(source, PRESETS["atom-w3a3"], x.t() @ x)
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(2))
    error = x @ (got.weight.dequantize() - weight).t()
    want = (error.norm() / (x @ weight.t()).norm()).item()
    assert got.relative_error == pytest.approx(want, rel=1e-3)


def test_inputs_that_are_all_zero_have_no_error_and_no_nan(source):
    assert round_o(source, PRESETS["atom-w4a4kv4"], torch.zeros(256, 256)).relative_error == 0.0


def test_magnitudes_find_the_planted_outliers(source):
    """conftest multiplies eight channels of each norm by 20."""
    tokens = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(0))
    for layer in (0, 1):
        measured = channel_magnitudes(source, tokens, layer, CPU)
        assert [m.site for m in measured] == ["qkv", "o", "gate_up", "down"]
        qkv = measured[0]
        norm = source.load(f"model.layers.{layer}.input_layernorm.weight")
        planted = norm.abs().topk(8).indices
        assert set(planted.tolist()) == set(qkv.order[-8:].tolist())
        assert qkv.largest_over_median > 5
        assert (qkv.second_moment <= qkv.absmax.square() * 1.0001).all()
    with pytest.raises(ModelError, match="layer 2 does not exist: the model has 0 to 1"):
        channel_magnitudes(source, tokens, 2, CPU)
