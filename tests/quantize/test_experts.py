"""Routed experts: their statistics by hand, what is done where few tokens came, and the report."""

import json
from dataclasses import replace

import pytest
import torch

from quatom.checkpoint.reader import open_source
from quatom.errors import RecipeError
from quatom.loading import load_float_layer
from quatom.modeling.build import build_block
from quatom.modeling.rotary import RotaryTables
from quatom.ops.experts import Routing, group_tokens
from quatom.plan import plan
from quatom.presets import PRESETS
from quatom.quantize.expert_report import ExpertReport
from quatom.quantize.expert_statistics import ExpertInputs, ExpertSums, down_input
from quatom.quantize.measure import EXPERT_TOKENS, measure_channels, measure_moments
from quatom.quantize.pipeline import REPORT_FILE, quantize_checkpoint
from quatom.quantize.rounding import round_experts, round_site
from quatom.quantize.statistics import ChannelScores, SecondMoments, run_block
from quatom.quantize.transforms import transforms_of
from quatom.recipe import CalibrationSpec, GPTQSpec, WeightSpec
from tests.families.models import save_tiny
from tests.quantize.planted_experts import (
    RARE,
    planted,
    quantization_error,
    random_hidden,
    with_bound,
)

CPU = torch.device("cpu")
ATOM = PRESETS["atom-w4a4kv4"]
FLOAT = PRESETS["fp16"]
IDS = torch.tensor([[0, 2], [2, 0], [0, 1]], dtype=torch.int32)
SHARES = torch.tensor([[0.5, 0.25], [1.0, 0.0], [0.75, 0.5]])
X = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, -1.0]])


def inputs(site, x, top_k):
    return ExpertInputs(site, x, top_k, group_tokens(IDS, 4), Routing(IDS, SHARES))


def test_tokens_count_by_the_square_of_their_weight():
    scores = ExpertSums(ChannelScores("second_moment"), 4, 1, ("experts_gate_up", "experts_down"))
    scores.add(inputs("experts_gate_up", X, 2))
    assert scores.tokens.tolist() == [2, 1, 2, 0]  # one came to expert 0 with a weight of 0
    got = scores.finish("experts_gate_up")
    # Expert 0 has tokens 0 (weight 0.5), 1 (0) and 2 (0.75).
    want = 0.5**2 * X[0] ** 2 + 0.75**2 * X[2] ** 2
    assert torch.allclose(got[0], want)
    assert torch.allclose(got[2], 0.25**2 * X[0] ** 2 + X[1] ** 2)
    assert not got[3].any()
    # Rows of a down projection come in grouped order: 0 0 0 1 2 2.
    rows = torch.arange(12.0).view(6, 2)
    moments = ExpertSums(SecondMoments(), 4, 1, ("experts_down",))
    moments.add(inputs("experts_gate_up", X, 2))
    moments.add(inputs("experts_down", rows, None))
    own = rows[4:] * torch.tensor([[0.25], [1.0]])
    assert torch.allclose(moments.finish("experts_down")[2], own.T @ own)


def test_mean_magnitudes_count_by_the_weight():
    scores = ExpertSums(ChannelScores("abs_mean"), 4, 1, ("experts_gate_up",))
    scores.add(inputs("experts_gate_up", X, 2))
    assert torch.allclose(scores.finish("experts_gate_up")[2], 0.25 * X[0] + 1.0 * X[1])


def test_few_tokens_are_blended_with_all():
    bound = 4
    scores = ExpertSums(ChannelScores("second_moment"), 4, bound, ("experts_gate_up",))
    scores.add(inputs("experts_gate_up", X, 2))
    assert scores.starving() == [0, 1, 2, 3]
    for expert in (2, 3):
        scores.add_all("experts_gate_up", expert, X)
    got = scores.finish("experts_gate_up")
    every = (X**2).mean(dim=0)
    own = (0.25**2 * X[0] ** 2 + X[1] ** 2) / (0.25**2 + 1.0)
    assert torch.allclose(got[2], 0.5 * own + 0.5 * every)  # 2 tokens of 4
    assert torch.allclose(got[3], every)  # none: all tokens'


def test_tokens_without_weight_have_not_come():
    # 1e-30 is a float32, its square is 0: without tokens of its own, expert 1 is measured on all.
    ids = torch.tensor([[0, 1], [0, 1]], dtype=torch.int32)
    shares = torch.tensor([[1.0, 1e-30], [1.0, 1e-30]])
    moments = ExpertSums(SecondMoments(), 2, 1, ("experts_gate_up",))
    routing, groups = Routing(ids, shares), group_tokens(ids, 2)
    moments.add(ExpertInputs("experts_gate_up", X[:2], 2, groups, routing))
    assert moments.tokens.tolist() == [2, 0]
    assert moments.starving() == [1]
    moments.add_all("experts_gate_up", 1, X[:2])
    assert torch.allclose(moments.finish("experts_gate_up")[1], X[:2].T @ X[:2] / 2)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_source(save_tiny(tmp_path_factory.mktemp("moe") / "m", "qwen2_moe"))


SPARSE = 1
"""The layer of that model that has experts, and a shared one."""


def block_of(source, recipe=FLOAT, weights=None):
    layer = plan(source.model_config, recipe).layers[SPARSE]
    weights = weights or load_float_layer(source, layer, CPU, torch.float32)
    return layer, weights, build_block(layer, weights)


def test_a_block_is_measured_expert_by_expert(source):
    _, _, block = block_of(source)
    hidden = torch.randn(2, 20, 128, generator=torch.Generator().manual_seed(0))
    rotary = RotaryTables(source.model_config, 20)
    seen = {}
    block.router.register_forward_hook(lambda _, x, out: seen.update(x=x[0], routing=out))
    moments, tokens = measure_moments(block, hidden, rotary, tf32=False, bound=1)
    x, routing = seen["x"], seen["routing"]
    assert tokens.tolist() == routing.expert_ids.flatten().bincount(minlength=6).tolist()
    for expert in range(6):
        mine = routing.expert_ids == expert
        share = (routing.weights * mine).sum(dim=1)
        rows = x * share[:, None]
        assert torch.allclose(moments["experts_gate_up"][expert], rows.T @ rows, atol=1e-4)
        rows = down_input(block, expert, x) * share[:, None]
        assert torch.allclose(moments["experts_down"][expert], rows.T @ rows, atol=1e-4)
    # The input that all experts share, and that of the shared expert, are those of all tokens.
    counted = replace(ATOM, calibration=replace(ATOM.calibration, min_expert_tokens=1))
    statistics = measure_channels(block, hidden, rotary, counted)[1]
    for site in ("experts_gate_up", "gate_up"):
        assert torch.allclose(statistics[f"second_moment.{site}"], x.square().sum(0), rtol=1e-5)
    assert statistics["second_moment.experts_down"].shape == (6, 96)
    assert torch.equal(statistics[EXPERT_TOKENS], tokens)


def test_an_expert_without_tokens_is_measured_on_all(source):
    _, weights, _ = block_of(source)
    router = dict(weights.router)
    router["weight"] = router["weight"].clone()
    router["weight"][4] = 0.0  # a score of 0: never among the largest 3 of 6 below
    router["weight"][[0, 1, 2]] *= 1e-3
    router["weight"][[3, 5]] *= 1e-3
    _, _, block = block_of(source, weights=replace(weights, router=router))
    block.router.register_forward_hook(
        lambda _, __, out: Routing(out.expert_ids % 4, out.weights)  # 4 and 5 never
    )
    hidden = torch.randn(1, 30, 128, generator=torch.Generator().manual_seed(0))
    normed = []
    block.router.register_forward_hook(lambda _, x, __: normed.append(x[0]))
    rotary = RotaryTables(source.model_config, 30)
    moments, tokens = measure_moments(block, hidden, rotary, tf32=False, bound=1)
    assert tokens[4:].tolist() == [0, 0]
    rows = down_input(block, 4, normed[0])
    mean = rows.T @ rows / 30
    assert torch.allclose(moments["experts_down"][4], mean, atol=1e-5)
    assert torch.allclose(moments["experts_gate_up"][4], normed[0].T @ normed[0] / 30, atol=1e-5)


@pytest.mark.parametrize("name", ["atom-w4a4kv4", "quatom-w4a4kv4"])
def test_transforms_change_nothing_that_the_block_computes(source, name):
    layer, weights, block = block_of(source)
    site = weights.sites["experts_gate_up"]
    uneven = site.weight.clone()
    uneven[2, 96:] /= 2.0**9  # what balancing is for, in one expert
    sites = {**weights.sites, "experts_gate_up": replace(site, weight=uneven)}
    weights = replace(weights, sites=sites)
    block = build_block(layer, weights)
    hidden = torch.randn(2, 20, 128, generator=torch.Generator().manual_seed(0))
    rotary = RotaryTables(source.model_config, 20)
    want = run_block(block, hidden, rotary)
    recipe = PRESETS[name]
    resolved = plan(source.model_config, recipe).layers[SPARSE]
    transforms = transforms_of(recipe)
    prepared = transforms.prepare(resolved, weights)
    assert not torch.equal(
        prepared.sites["experts_down"].weight[2], sites["experts_down"].weight[2]
    )
    assert torch.equal(prepared.sites["experts_down"].weight[1], sites["experts_down"].weight[1])
    statistics = measure_channels(build_block(layer, prepared), hidden, rotary, recipe)[1]
    arranged = transforms.finish(resolved, prepared, statistics)
    orders = arranged.sites["experts_down"].order
    assert orders.shape == (6, 96)
    assert len({tuple(order.tolist()) for order in orders}) == 6
    # Undo the rotation that quantizing the input would apply, then run the rewritten floats.
    if recipe.activations.rotation == "none":
        plain = plan(source.model_config, replace(recipe, activations=FLOAT.activations))
        unquantized = replace(plain.layers[SPARSE], kv_cache=FLOAT.kv_cache)
        got = run_block(build_block(unquantized, arranged), hidden, rotary)
        # Sums in another order: 1e-6 of the output.
        assert (got - want).abs().max() < 1e-4 * want.abs().max()


def test_every_expert_is_rounded_with_its_own_moments(source):
    recipe = replace(PRESETS["w4a16"], weights=WeightSpec(group_size=32))
    site = plan(source.model_config, recipe).layers[SPARSE].sites["experts_down"]
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(6, 128, 96, generator=generator)
    rows = torch.randn(6, 200, 96, generator=generator) * torch.rand(6, 1, 96, generator=generator)
    moments = rows.mT @ rows
    together = round_experts(site, weights, moments, recipe)
    for expert in range(6):
        alone = round_site(site, weights[expert], moments[expert], None, recipe)
        assert torch.equal(together.values[expert].float(), alone.weight.values)
        assert torch.equal(together.scales[expert], alone.weight.scales)
        assert together.relative_errors[expert] == alone.relative_error
    assert together.values.dtype == torch.int8
    moments[3] = torch.nan  # which no damping mends
    allowed = replace(
        recipe, weights=replace(recipe.weights, rounder=GPTQSpec(on_singular="nearest"))
    )
    tolerant = plan(source.model_config, allowed).layers[SPARSE].sites["experts_down"]
    nearest = round_experts(tolerant, weights, moments, allowed).nearest
    assert nearest == [False] * 3 + [True] + [False] * 2
    with pytest.raises(Exception, match="experts_down of expert 3"):
        round_experts(site, weights, moments, recipe)


def test_the_report_names_experts_tokens_and_what_was_done(source, text_file, tmp_path):
    recipe = replace(
        PRESETS["atom-w4a4kv4"],
        calibration=CalibrationSpec(num_samples=2, sequence_length=40, min_expert_tokens=40),
    )
    blocks = []
    quantize_checkpoint(
        source.folder, tmp_path / "q", recipe, calibration=text_file, on_block=blocks.append
    )
    report = json.loads((tmp_path / "q" / REPORT_FILE).read_text())["blocks"]
    assert [sorted(block) for block in report] == [
        ["block", "linear_errors", "relative_error"],
        ["block", "experts", "linear_errors", "relative_error"],
        ["block", "linear_errors", "relative_error"],
    ]
    dense = {"qkv", "o", "gate_up", "down"}
    assert [set(block["linear_errors"]) - dense for block in report] == [
        set(),
        {"experts_gate_up", "experts_down"},
        set(),
    ]
    experts = report[1]["experts"]
    assert sum(experts["moment_tokens"]) == sum(experts["order_tokens"]) == 2 * 40 * 3
    few = {str(e) for e, n in enumerate(experts["moment_tokens"]) if n < 40}
    assert few
    for expert in few:
        tokens = experts["moment_tokens"][int(expert)]
        entry = experts["exceptions"][expert]
        assert entry["moment_tokens"] == tokens
        assert entry["moment_tokens_share"] == round(tokens / 40, 4)
    assert few <= experts["exceptions"].keys()  # the rest had few in the floating-point network
    assert len(blocks[1].experts.sentences(40)) == len(experts["exceptions"])

    # An interrupted run knows the same at its end.
    def stop(block):
        if block.index == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(
            source.folder, tmp_path / "r", recipe, calibration=text_file, on_block=stop
        )
    quantize_checkpoint(source.folder, tmp_path / "r", recipe, calibration=text_file, resume=True)
    assert json.loads((tmp_path / "r" / REPORT_FILE).read_text())["blocks"] == report


def test_sentences():
    report = ExpertReport(None, torch.tensor([0, 30, 200]), torch.tensor([False, False, True]))
    assert report.sentences(100) == [
        "expert 0: 0 tokens of at least 100, its statistics are those of all tokens",
        "expert 1: 30 tokens of at least 100, its statistics are 30% its own and the rest those of "
        "all tokens",
        "expert 2: rounded to nearest, its moments were singular",
    ]
    # Few tokens in either of the two networks are an exception.
    order, moments = torch.tensor([50, 200, 7]), torch.tensor([200, 200, 0])
    both = ExpertReport(order, moments, torch.tensor([False] * 3))
    assert [sentence[:22] for sentence in both.sentences(100)] == [
        "expert 0: 50 tokens of",
        "expert 2: 0 tokens of ",
    ]
    assert list(both.describe(100)["exceptions"]) == ["0", "2"]
    again = ExpertReport.from_state(report.state())
    assert again.describe(100) == report.describe(100)
    assert again.order_tokens is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensor_parallel": 2}, "tensor_parallel 2 .*routed experts"),
        (
            {"weights": WeightSpec(rounder=GPTQSpec(float_target=1.0))},
            "weights.rounder.float_target 1.0",
        ),
    ],
)
def test_what_experts_cannot_have_is_refused_before_work(
    source, changes, message, text_file, tmp_path
):
    recipe = replace(PRESETS["atom-w4a4kv4"], **changes)
    with pytest.raises(RecipeError, match=message):
        quantize_checkpoint(source.folder, tmp_path / "q", recipe, calibration=text_file)
    assert list(tmp_path.iterdir()) == []


@torch.no_grad()
def test_an_order_per_expert_costs_least_and_expert_0s_most(tmp_path):
    model = planted(tmp_path / "m")
    recipe = PRESETS["atom-w4a4kv4"]
    texts = {"calibration": random_hidden(2048, 1), "held_out": random_hidden(512, 2)}
    errors = {
        kind: quantization_error(model, recipe, order=kind, **texts)
        for kind in ("per expert", "per layer", "expert 0's")
    }
    # Measured: 0.210, 0.233, 0.252.
    assert errors["per expert"] < 0.95 * errors["per layer"]
    assert errors["per layer"] < 0.95 * errors["expert 0's"]


@torch.no_grad()
def test_blended_statistics_of_a_rare_expert_are_better_than_its_few(tmp_path):
    model = planted(tmp_path / "m", rarity=1.0)
    texts = {"calibration": random_hidden(512, 1), "held_out": random_hidden(4096, 2)}
    few, blended = (
        quantization_error(
            model, with_bound(PRESETS["quatom-w4a8kv4"], bound), of_expert=RARE, **texts
        )
        for bound in (1, 1024)
    )
    assert blended < 0.95 * few  # measured: 0.162 and 0.186
