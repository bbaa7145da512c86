"""K's offset and scaling: the network stays the same, the cache holds less."""

from dataclasses import replace

import pytest
import torch

from quatom.checkpoint.reader import open_source
from quatom.checkpoint.schema import qk_norm_shapes
from quatom.errors import ShapeError
from quatom.families.spec import Norm
from quatom.loading import load, load_float_layer
from quatom.modeling.build import build_block
from quatom.modeling.context import full_sequences_context
from quatom.modeling.rotary import RotaryTables
from quatom.numerics.kv_pages import KVPages
from quatom.ops.rope_append_kv import rope_append_kv
from quatom.ops.rope_append_kv.reference import rotate_halves
from quatom.plan import plan
from quatom.presets import PRESETS
from quatom.quantize.pipeline import quantize_checkpoint
from quatom.quantize.statistics import KeyStatistics, observe, run_block
from quatom.quantize.transforms import transforms_of
from quatom.quantize.tuning.block import build_tuned_block
from quatom.quantize.walk import embed
from quatom.recipe import CalibrationSpec, KVSpec, PostRopeKeys
from tests.checkpoint.models import CONFIG, write_model
from tests.conftest import write_byte_tokenizer

BIASED = CONFIG | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 260,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 256,
    "intermediate_size": 384,
}
KEYS = KVSpec(format="float16", keys=PostRopeKeys(offset="mean"), key_scaling="balanced")


@pytest.fixture(scope="module")
def qwen_dir(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("models") / "qwen", BIASED)
    write_byte_tokenizer(folder)
    return folder


CPU = torch.device("cpu")


def layer_of(source, recipe=PRESETS["fp16"]):
    return plan(source.model_config, recipe).layers[0]


@pytest.fixture(scope="module")
def measured(qwen_dir):
    """Source, first block with biased keys, its input, rotary, and statistics of its keys."""
    source = open_source(qwen_dir)
    tokens = torch.randint(0, 260, (3, 24), generator=torch.Generator().manual_seed(0))
    hidden = embed(source, tokens, CPU, torch.float32)
    rotary = RotaryTables(source.model_config, 24)
    layer = layer_of(source)
    weights = load_float_layer(source, layer, CPU, torch.float32)
    qkv, first = weights.sites["qkv"], layer.spec.attention.q_size
    # A bias thirty times what tokens differ by, on a channel that rotates slowly.
    spread = qkv.weight[first : first + 128].norm(dim=1).mean()
    qkv.bias[[first + 30, first + 94]] += 30.0 * spread
    qkv.weight[[first + 5, first + 37]] *= 8.0  # a rotary pair of channels
    module = build_block(layer, weights)
    heads, statistics = [], KeyStatistics(layer.spec.attention, 24)

    def see(q, k, v):
        statistics.add(q, k)
        heads.append((q, k))

    with observe(module, see_heads=see):
        run_block(module, hidden, rotary)
    q, k = (torch.cat(x).unflatten(0, (3, 24)) for x in zip(*heads, strict=True))
    return source, weights, hidden, rotary, statistics.finish(rotary.of(0)), q, k


def tables(source, rotary):
    return rotary.of(0)


def test_statistics_are_the_means_over_all_tokens(measured):
    source, *_, rotary, statistics, q, k = measured
    rope = tables(source, rotary)
    rotated = torch.stack([rotate_halves(x, *rope) for x in k])
    torch.testing.assert_close(
        statistics["key_mean"], rotated.mean(dim=(0, 1)), rtol=1e-4, atol=1e-4
    )
    pairs = rotated.square().mean(dim=(0, 1)).unflatten(-1, (2, -1)).sum(dim=1)
    torch.testing.assert_close(statistics["key_squares"], pairs, rtol=1e-4, atol=1e-4)
    queries = q.square().mean(dim=(0, 1)).unflatten(-1, (2, -1)).sum(dim=1)
    shared = queries.unflatten(0, (2, 2)).sum(dim=1)
    torch.testing.assert_close(statistics["query_squares"], shared, rtol=1e-4, atol=1e-4)


def test_heads_are_seen_and_tuned_as_their_norms_leave_them(measured):
    source, weights, hidden, rotary, *_ = measured
    layer = layer_of(source)
    attention = replace(layer.spec.attention, qk_norm=Norm(eps=1e-6))
    layer = replace(layer, spec=replace(layer.spec, attention=attention))
    size = attention.head_dim
    weights = replace(weights, qk_norm=(torch.full((size,), 2.0), torch.full((size,), 3.0)))
    seen = []
    module = build_block(layer, weights)
    with observe(module, see_heads=lambda *heads: seen.append(heads)):
        want = run_block(module, hidden, rotary)
    for q, k, _ in seen:  # rows of mean square 1, times the weights
        for x, square in ((q, 4.0), (k, 9.0)):
            torch.testing.assert_close(
                x.square().mean(-1), torch.full(x.shape[:2], square), rtol=1e-4, atol=0
            )
    context = full_sequences_context(*hidden.shape[:2], 64, CPU)
    tuned = build_tuned_block(layer, weights)
    got = sum(tuned(hidden.flatten(0, 1), None, context, None, rotary))
    # Sums of float32 in another order, of numbers around 1.
    torch.testing.assert_close(got.view_as(want), want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("axis", ["head", "each", "all"])
@pytest.mark.parametrize("key_scaling", ["balanced", "weighted"])
def test_norms_of_heads_take_the_factors(axis, key_scaling, measured):
    source, weights, hidden, rotary, statistics, *_ = measured
    layer = layer_of(source)
    attention = replace(
        layer.spec.attention, qk_norm=Norm(kind="layer", eps=1e-6), qk_norm_axis=axis
    )
    layer = replace(layer, spec=replace(layer.spec, attention=attention))
    generator = torch.Generator().manual_seed(5)
    q, k = (1 + 0.3 * torch.randn(s, generator=generator) for s in qk_norm_shapes(attention))
    weights = replace(weights, qk_norm=(q, k))
    statistics = dict(statistics)
    for name in ("key_mean", "key_squares", "query_squares"):
        statistics[f"weighted_{name}"] = statistics[name]
    cache = replace(KEYS, keys=PostRopeKeys(offset="none"), key_scaling=key_scaling)
    recipe = replace(PRESETS["fp16"], kv_cache=cache)
    planned = replace(layer, kv_cache=cache)
    balanced = transforms_of(recipe).finish(planned, weights, statistics)
    assert torch.equal(balanced.sites["qkv"].weight, weights.sites["qkv"].weight)
    ratio = weights.qk_norm[1] / balanced.qk_norm[1]
    assert ratio.max() > 1.4 * ratio.min()
    if axis == "each":  # heads differ: each has a factor of its own
        assert not torch.equal(ratio[0], ratio[1])
    want = run_block(build_block(layer, weights), hidden, rotary)
    got = run_block(build_block(layer, balanced), hidden, rotary)
    assert (got - want).norm() < 1e-3 * want.norm()  # as below


@pytest.mark.parametrize("key_offset", ["none", "mean"])
@pytest.mark.parametrize("key_scaling", ["none", "balanced"])
@pytest.mark.parametrize("rotation", ["none", "hadamard"])
def test_the_block_computes_the_same(measured, key_offset, key_scaling, rotation):
    source, weights, hidden, rotary, statistics, *_ = measured
    spec = replace(
        KEYS, keys=PostRopeKeys(offset=key_offset, rotation=rotation), key_scaling=key_scaling
    )
    recipe = replace(PRESETS["fp16"], kv_cache=spec)
    layer = layer_of(source, recipe)
    balanced = transforms_of(recipe).finish(layer, weights, statistics)
    assert (balanced.key_offset is None) == (key_offset == "none")
    changed = not torch.equal(balanced.sites["qkv"].weight, weights.sites["qkv"].weight)
    assert changed == (key_scaling == "balanced")
    want = run_block(build_block(layer_of(source), weights), hidden, rotary)
    got = run_block(build_block(layer, balanced), hidden, rotary)
    # Scores of this model reach hundreds: float32 keeps them to about 1e-5, a softmax between two
    # near equals magnifies that.
    assert (got - want).norm() < 1e-3 * want.norm()


def test_scaling_is_by_powers_of_two_and_evens_out_what_errors_weigh(measured):
    source, weights, _, _, statistics, *_ = measured
    recipe = replace(PRESETS["fp16"], kv_cache=KEYS)
    layer = layer_of(source, recipe)
    balanced = transforms_of(recipe).finish(layer, weights, statistics)
    first = layer.spec.attention.q_size
    ratio = balanced.sites["qkv"].weight[first:] / weights.sites["qkv"].weight[first:]
    assert torch.equal(ratio.log2(), ratio.log2().round())
    keys = statistics["key_squares"]
    keys = keys - statistics["key_mean"].square().unflatten(-1, (2, -1)).sum(dim=1)
    scale = (1 / ratio[:128, 0]).view(2, 64)[:, :32]
    # l**4 = E[k**2] / E[q**2] up to the rounding of its logarithm.
    off = scale.log2() - (keys / statistics["query_squares"]).log2() / 4
    assert off.abs().max() <= 0.5001


def test_an_int4_cache_loses_less_of_biased_keys(measured):
    source, *_, rotary, statistics, q, k = measured
    rope = tables(source, rotary)
    errors = {}
    for name, offset in (("none", None), ("mean", statistics["key_mean"])):
        read = {}
        for dtype in ("float32", "int4"):
            pages = KVPages.allocate(2, 16, 2, 64, dtype, k.device)
            token = torch.arange(24)
            rope_append_kv(
                q[0], k[0], k[0], *rope, token, token, pages, rotate_kv=True, key_offset=offset
            )
            read[dtype] = pages.gather(torch.arange(2), 24)[0][:, 0]  # the biased KV head
        errors[name] = (read["int4"] - read["float32"]).norm()
    assert errors["mean"] < 0.5 * errors["none"], errors


@pytest.mark.parametrize("rotate_kv", [False, True])
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("dtype", ["float32", "int4"])
def test_the_offset_is_taken_from_rotated_keys(rotate_kv, backend, dtype, device):
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(5, 4, 64, generator=generator).to(device)
    k, v = (torch.randn(5, 2, 64, generator=generator).to(device) for _ in range(2))
    offset = torch.randn(2, 64, generator=generator).to(device) * 10
    angle = torch.randn(9, 32, generator=generator).to(device)
    cos, sin = angle.cos(), angle.sin()
    positions = torch.tensor([0, 3, 8, 1, 1], device=device)
    slots = torch.arange(5, device=device)

    def cached(keys, key_offset):
        pages = KVPages.allocate(1, 16, 2, 64, dtype, torch.device(device))
        rope_append_kv(
            q, keys, v, cos, sin, positions, slots, pages,
            rotate_kv=rotate_kv, key_offset=key_offset, backend=backend,
        )  # fmt: skip
        return pages.gather(torch.zeros(1, dtype=torch.int64, device=device), 5)[0]

    # Keys from which the offset, turned back, was taken before: the same in real arithmetic.
    back = rotate_halves(offset.expand(5, 2, 64), cos[positions], -sin[positions])
    got, want = cached(k, offset), cached(k - back, None)
    # Float32 rounding of values up to 50; it may move a value to the next of 16 codes.
    atol = 1e-3 if dtype == "float32" else 1.01 * (want.amax() - want.amin()).item() / 15
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


def test_a_checkpoint_holds_the_offset_and_runs_with_it(qwen_dir, text_file, tmp_path):
    spec = CalibrationSpec(num_samples=4, sequence_length=32)
    recipe = replace(PRESETS["quatom-w4a4kv4"], calibration=spec)
    seen = []
    quantize_checkpoint(
        qwen_dir, tmp_path / "q", recipe, calibration=text_file, on_block=seen.append
    )
    loaded = load(tmp_path / "q")
    for block, made in zip(loaded.model.blocks, seen, strict=True):
        assert block.key_offset.shape == (2, 64)
        assert torch.equal(block.key_offset, made.module.key_offset)
        assert block.key_offset.abs().max() > 0


def test_an_offset_needs_rotated_keys():
    pages = KVPages.allocate(1, 16, 2, 64, "int4", torch.device("cpu"))
    x = torch.zeros(1, 2, 64)
    table, one = torch.zeros(1, 32), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ShapeError, match="rotate_keys_in_cache"):
        rope_append_kv(
            x, x, x, table, table, one, one, pages,
            rotate_keys_in_cache=False, key_offset=torch.zeros(2, 64),
        )  # fmt: skip
    with pytest.raises(ShapeError, match=r"must be \(2, 64\) float32"):
        rope_append_kv(
            x, x, x, table, table, one, one, pages, key_offset=torch.zeros(64)
        )  # fmt: skip
