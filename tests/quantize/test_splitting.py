"""Channels split into parts and merged: by the paper's formulas, worked out again with loops."""

import math
from dataclasses import replace

import pytest
import torch

from quatom.checkpoint.codec import decode
from quatom.checkpoint.reader import open_source
from quatom.errors import CheckpointError, RecipeError, ShapeError
from quatom.loading import load_float_layer
from quatom.modeling.build import build_block
from quatom.modeling.rotary import RotaryTables
from quatom.numerics.groups import GroupLayout
from quatom.numerics.reorder import check_order
from quatom.plan import plan
from quatom.presets import PRESETS
from quatom.quantize.input_samples import SEQUENCES, TOKENS, InputSamples
from quatom.quantize.measure import measure_channels
from quatom.quantize.pipeline import quantize_checkpoint
from quatom.quantize.statistics import run_block
from quatom.quantize.transforms import transforms_of
from quatom.quantize.transforms.scaling import can_fold
from quatom.quantize.transforms.splitting import candidate_parts, reassemble, search_parts
from quatom.quantize.tuning.straight_through import quantize_input
from quatom.recipe import (
    ActivationSpec,
    CalibrationSpec,
    OutlierSpec,
    ScalingSpec,
    SplittingSpec,
    WeightSpec,
)
from tests.families.models import save_tiny

CPU = torch.device("cpu")
SPLIT = replace(PRESETS["qllm-w4a4kv4"], tuning=None)
# Gated and not, biases, norms of 1 + w, layer norms, no norm in front, a GELU that divides nothing.
FAMILIES = ("llama", "qwen2", "gemma3", "olmo2", "opt", "starcoder2", "mixtral")


def planted(channels=60, rows=20, tokens=300):
    """Inputs with large channels, some that others resemble, and a weight."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(tokens, channels, generator=generator)
    for one, other in ((10, 11), (20, 21), (30, 31), (40, 41)):
        x[:, one] = 0.7 * x[:, other] + 0.1 * x[:, one]
    x[:, 3] *= 25.0
    x[:, 8] *= 9.0
    return x, torch.randn(rows, channels, generator=generator)


def by_hand(x, weight, parts):
    """Order and columns, channel by channel and pair by pair."""
    channels = x.shape[1]
    columns = {c: weight[:, c].clone() for c in range(channels)}
    energy = {c: float(x[:, c] @ x[:, c] * (weight[:, c] @ weight[:, c])) for c in range(channels)}
    whole = sorted((c for c in range(channels) if parts[c] == 1), key=energy.__getitem__)
    few, many = whole[: len(whole) // 2], whole[len(whole) // 2 :]
    best = []
    for a in few:
        costs = []
        for b in many:
            c = float(x[:, a] @ x[:, b] / (x[:, b] @ x[:, b]))
            lost = torch.outer(x[:, a], weight[:, a]) - c * torch.outer(x[:, b], weight[:, a])
            costs.append((float(lost.square().sum()), b, c))
        best.append((*min(costs), a))
    extra = sum(int(p) - 1 for p in parts)
    gone = sorted(best)[:extra]
    for _, b, c, a in gone:
        columns[b] += c * weight[:, a]
    added = [c for c in range(channels) for _ in range(int(parts[c]) - 1)]
    places = dict(zip(sorted(a for *_, a in gone), added, strict=True))
    order = [places.get(c, c) for c in range(channels)]
    return order, torch.stack([columns[c] for c in order], dim=1)


def test_parts_are_those_of_falling_thresholds():
    absmax = torch.tensor([16.0, 0.5, 7.0, 0.0, 1.0])
    got = [parts.tolist() for parts in candidate_parts(absmax, most=10)]
    want = []
    for step in range(100):
        threshold = 16.0 * 2 ** (-step / 4)
        # Quotients of powers of two are exact; no other one here is near an integer.
        parts = [max(1, math.ceil(round(a / threshold, 6))) for a in absmax.tolist()]
        if sum(parts) - 5 > 10:
            break
        if parts not in want:
            want.append(parts)
    assert got == want
    assert got[0] == [1] * 5
    assert got[-1] == [8, 1, 4, 1, 1]
    assert [p.tolist() for p in candidate_parts(torch.zeros(3), 2)] == [[1, 1, 1]]


def test_splitting_and_merging_by_hand():
    x, weight = planted()
    parts = torch.ones(60, dtype=torch.int64)
    parts[3], parts[8] = 5, 2
    got = reassemble(weight, x.t() @ x, parts)
    order, columns = by_hand(x, weight, parts.tolist())
    assert got.order.tolist() == order
    # Sums of 300 products in float32, in another order.
    torch.testing.assert_close(got.columns, columns, rtol=1e-4, atol=1e-4)
    counts = torch.bincount(got.order, minlength=60)
    assert counts[3] == 5
    assert counts[8] == 2
    # Of each pair that resembles another the weaker one went first.
    gone = (counts == 0).nonzero().squeeze(1).tolist()
    assert len(gone) == 5
    assert {10, 20, 30, 40} <= set(gone)


def test_no_output_changes_where_merged_channels_are_multiples_of_others():
    x, weight = planted()
    for one, other in ((10, 11), (20, 21), (30, 31), (40, 41)):
        x[:, other] *= 3.0  # among the stronger half
        x[:, one] = -0.2 * x[:, other]
    parts = torch.ones(60, dtype=torch.int64)
    parts[3], parts[8] = 3, 3
    got = reassemble(weight, x.t() @ x, parts)
    made, want = (x / parts)[:, got.order] @ got.columns.t(), x @ weight.t()
    # Coefficients of float32 sums, 1e-6 of channels that are 1e-1 of the output.
    assert (made - want).abs().max() <= 1e-5 * want.abs().max()


def test_the_search_finds_the_threshold_of_least_error():
    """Every threshold again, inputs rounded by hand."""
    site, layout = plan_of("llama").layers[0].sites["down"], GroupLayout(normal=60, group_size=60)
    assert site.input_spec is not None
    site = replace(site, layout=layout, input_spec=replace(site.input_spec, layout=layout))
    x, weight = planted()
    absmax, wanted, most = x.abs().amax(dim=0), x @ weight.t(), int(0.2 * 60)
    errors = {}
    for step in range(60):
        parts = (absmax / (absmax.max() * 2 ** (-step / 4))).ceil().clamp(min=1).long()
        if int((parts - 1).sum()) > most:
            break
        order, columns = by_hand(x, weight, parts.tolist())
        divided = (x / parts)[:, order]
        scale = (divided.abs().amax(dim=1, keepdim=True) / 7).half().float()
        rounded = (divided / scale).round().clamp(-8, 7) * scale
        errors[step] = float((rounded @ columns.t() - wanted).square().sum()), parts
    least, parts = min(errors.values(), key=lambda pair: pair[0])
    got = search_parts(site, weight, absmax, x.t() @ x, x, 0.2)
    assert torch.equal(got.parts, parts)
    assert int((parts - 1).sum()) not in (0, most)
    assert least < 0.2 * errors[0][0]


_SOURCES = {}


@pytest.fixture(scope="module", autouse=True)
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    _SOURCES.update({name: open_source(save_tiny(folder / name, name)) for name in FAMILIES})


def plan_of(family, recipe=SPLIT):
    return plan(_SOURCES[family].model_config, recipe)


def first_layer(family):
    """First layer with outliers and, where channels divide, a fourth of the columns zero."""
    layer = plan_of(family).layers[0]
    weights = load_float_layer(_SOURCES[family], layer, CPU, torch.float32)
    generator = torch.Generator().manual_seed(1)
    norms = dict(weights.norms)
    for name, norm in norms.items():
        large = norm.weight.clone()
        large[torch.randperm(large.numel(), generator=generator)[:5]] += 15.0
        norms[name] = replace(norm, weight=large)
    sites = dict(weights.sites)
    for name, held in sites.items():
        if can_fold(layer, name):
            columns = held.weight.clone()
            columns[:, torch.randperm(columns.shape[1], generator=generator)[::4]] = 0.0
            sites[name] = replace(held, weight=columns)
    return layer, replace(weights, norms=norms, sites=sites)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_block_computes_the_same(family):
    """Channels without weights are merged first, and cost nothing."""
    source, (layer, weights) = _SOURCES[family], first_layer(family)
    floating = plan_of(family, PRESETS["fp16"]).layers[0]
    size = source.model_config.hidden_size
    hidden = torch.randn(2, 40, size, generator=torch.Generator().manual_seed(0))
    rotary = RotaryTables(source.model_config, 40)
    want, statistics = measure_channels(build_block(floating, weights), hidden, rotary, SPLIT)
    split = transforms_of(SPLIT).finish(layer, weights, statistics)
    repeating = set()
    for name, held in split.sites.items():
        if layer.sites[name].order == "gathered":
            check_order(held.order, layer.sites[name].channels, repeats=True)
        if held.order is not None and len(held.order.unique()) < len(held.order):
            repeating.add(name)
    foldable = {name for name in layer.sites if can_fold(layer, name)}
    assert repeating <= foldable
    assert "qkv" in repeating or family == "olmo2"  # nothing in front of it divides
    # Orders as the block of the recipe gathers them, inputs and cache unrounded.
    cache = replace(SPLIT.kv_cache, format="float16")
    sites = {n: replace(site, input_spec=None) for n, site in layer.sites.items()}
    got = run_block(build_block(replace(layer, sites=sites, kv_cache=cache), split), hidden, rotary)
    # Float32 rounding of norms, factors and products, some 2**-22 each.
    assert (got - want).abs().max() <= 2e-5 * want.abs().max()


def test_columns_take_back_what_a_rounded_norm_was_really_divided_by():
    """A norm of 1 + w whose w is bfloat16: a third of 1 + w is none of its numbers."""
    layer = plan_of("gemma3").layers[0]
    weights = load_float_layer(_SOURCES["gemma3"], layer, CPU, torch.bfloat16)
    channels = layer.sites["qkv"].channels
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(64, channels, generator=generator)
    x[:, 7] *= 100.0
    statistics = {}
    for name, site in layer.sites.items():
        own = x if site.channels == channels else torch.ones(64, site.channels)
        statistics |= {f"absmax.{name}": own.abs().amax(dim=0), f"samples.{name}": own}
        statistics[f"moments.{name}"] = own.t() @ own
    split = transforms_of(SPLIT).finish(layer, weights, statistics)
    places = split.sites["qkv"].order == 7
    assert places.sum() >= 3
    before, after = (1 + w.norms["attention"].weight[7].float() for w in (weights, split))
    was, column = before * weights.sites["qkv"].weight[:, 7].float(), split.sites["qkv"].weight
    now = after * column[:, places].float().sum(dim=1)
    # Each entry of a column is rounded by up to 2**-8 of itself; all together by less.
    assert float(now @ was / (was @ was)) == pytest.approx(1.0, abs=2**-8)
    assert float(before / after / places.sum()) != pytest.approx(1.0, abs=2**-7)


def test_a_gradient_is_the_sum_of_those_of_its_parts():
    generator = torch.Generator().manual_seed(2)
    order = torch.tensor([0, 3, 3, 2, 3, 5])
    x = torch.randn(4, 6, generator=generator, requires_grad=True)
    factors = torch.randn(4, 6, generator=generator)
    (quantize_input(x, order, None, repeats=True) * factors).sum().backward()
    want = factors @ torch.nn.functional.one_hot(order, 6).float()
    torch.testing.assert_close(x.grad, want)


def test_samples_of_two_processes_add_up():
    x = torch.randn(12, 200, 8, generator=torch.Generator().manual_seed(3))

    def sampled(first, sequences):
        samples = InputSamples(200, first)
        for batch in sequences.split(3):
            samples.add("o", batch.flatten(0, 1))
        return samples.sums.get("o", 0)

    whole = sampled(0, x)
    assert whole.shape == (SEQUENCES * TOKENS, 8)
    assert torch.equal(sampled(0, x[:5]) + sampled(5, x[5:10]) + sampled(10, x[10:]), whole)
    places = [(2 * i + 1) * 200 // (2 * TOKENS) for i in range(TOKENS)]
    assert torch.equal(whole.view(SEQUENCES, TOKENS, 8), x[:SEQUENCES, places])
    few = InputSamples(3)
    few.add("o", torch.arange(6.0).unsqueeze(1))
    assert few.sums["o"][:6, 0].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def test_stored_lists_are_read_back_and_checked(tiny_llama_dir, text_file, tmp_path):
    recipe = replace(SPLIT, calibration=CalibrationSpec(num_samples=2, sequence_length=32))
    quantize_checkpoint(tiny_llama_dir, tmp_path / "q", recipe, calibration=text_file)
    source = open_source(tmp_path / "q")
    layer = plan(source.model_config, recipe).layers[0]
    for name in ("qkv", "gate_up"):
        site = layer.sites[name]
        prefixes = [linear.name for linear in site.linears]
        tensors = {n: source.load(n) for n in source.names() if n.startswith(tuple(prefixes))}
        order = decode(layer, site, tensors).order
        assert len(order.unique()) < site.channels
        for prefix in prefixes:
            tensors[f"{prefix}.order"] = tensors[f"{prefix}.order"].clone()
            tensors[f"{prefix}.order"][5] = site.channels
        with pytest.raises(CheckpointError, match=r"order is damaged .*from 0 to 255"):
            decode(layer, site, tensors)
    repeated = torch.zeros(4, dtype=torch.int64)
    check_order(repeated, 4, repeats=True)
    for wrong in (repeated[:3], repeated - 1, repeated + 4):
        with pytest.raises(ShapeError, match="no list of 4 channels"):
            check_order(wrong, 4, repeats=True)
    with pytest.raises(ShapeError, match="no permutation"):
        check_order(repeated, 4)


def test_what_splitting_cannot_stand_beside():
    groups = replace(SPLIT.weights, group_size=64), ActivationSpec(group_size=64)
    assert replace(SPLIT, weights=groups[0], activations=groups[1]).orders_channels
    for parts, needed in (
        ({"activations": ActivationSpec(format="float16")}, "quantized activations.format"),
        ({"activations": ActivationSpec(group_size=-1, rotation="hadamard")}, "rotation 'none'"),
        ({"outliers": OutlierSpec()}, "outliers.channels 0"),
        ({"weights": WeightSpec(group_size=-1, groups="ordered")}, "groups 'consecutive'"),
        ({"channel_scaling": ScalingSpec(method="smoothquant")}, "channel_scaling null"),
        ({"tensor_parallel": 2}, "tensor_parallel 1"),
    ):
        with pytest.raises(RecipeError, match=rf"channel_splitting divides .*{needed}"):
            replace(SPLIT, **parts)
    for share in (0.0, 0.34, -1.0):
        with pytest.raises(RecipeError, match=rf"largest_share must be in \(0, 1/3\], .*{share}"):
            SplittingSpec(largest_share=share)
