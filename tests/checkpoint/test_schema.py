"""The schema: what is stored, how large it is, and which recipes fit which models."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quatom.checkpoint.schema import (
    bits_by_linear,
    bits_per_activation,
    bits_per_kv,
    bits_per_weight,
    checkpoint_tensors,
    linear_tensors,
)
from quatom.errors import RecipeError
from quatom.families.registry import read_config
from quatom.numerics.groups import GroupLayout
from quatom.plan import num_outliers, plan
from quatom.presets import PRESETS
from quatom.recipe import (
    ActivationSpec,
    OutlierSpec,
    Recipe,
    WeightSpec,
)
from tests.checkpoint.models import CONFIG, LLAMA_7B, SMOLLM2

ATOM = PRESETS["atom-w4a4kv4"]
SMOL = read_config(SMOLLM2)
LLAMA = read_config(LLAMA_7B)
DOWN = "model.layers.0.mlp.down_proj"
QUERY = "model.layers.0.self_attn.q_proj"


def stored(recipe, config, name):
    """The tensors of one linear."""
    for site in plan(config, recipe).sites():
        for linear in site.linears:
            if linear.name == name:
                return linear_tensors(site, linear)
    raise KeyError(name)


def layout_of(recipe, config, name):
    sites = plan(config, recipe).sites()
    return next(s.layout for s in sites if name in [linear.name for linear in s.linears])


def test_the_stored_tensors_of_smollm2_worked_out_by_hand():
    # K = 576 = 4 groups of 128 + 64 outliers; two rows share a scale.
    assert {n.rpartition(".")[2]: (s.shape, s.dtype) for n, s in
            stored(ATOM, SMOL, QUERY).items()} == {
        "weight_packed": ((576, 256), torch.uint8),
        "weight_scale": ((288, 4), torch.float16),
        "outlier_weight": ((576, 64), torch.int8),
        "outlier_scale": ((576, 1), torch.float16),
        "order": ((576,), torch.int32),
    }  # fmt: skip
    # K = 1536: 1472 = 11 groups of 128 and one of 64; its order lies in gate's and up's rows.
    assert {n.rpartition(".")[2]: s.shape for n, s in
            stored(ATOM, SMOL, DOWN).items()} == {
        "weight_packed": (576, 736),
        "weight_scale": (288, 12),
        "outlier_weight": (576, 64),
        "outlier_scale": (576, 1),
    }  # fmt: skip


def test_smollm2_takes_at_most_four_and_a_half_bits():
    # Bits of one block: codes, INT8 outliers, scales (half the rows), outlier scales, orders.
    rows = 576 + 192 + 192 + 576 + 2 * 1536  # q k v o gate up, 576 channels each
    bits = rows * (512 * 4 + 64 * 8 + 4 * 16 / 2 + 16) + 6 * 576 * 32
    bits += 576 * (1472 * 4 + 64 * 8 + 12 * 16 / 2 + 16)
    assert bits_per_weight(plan(SMOL, ATOM)) == pytest.approx(
        bits / (rows * 576 + 576 * 1536), rel=1e-12
    )
    assert bits_per_weight(plan(SMOL, ATOM)) == pytest.approx(4.486979, abs=1e-6)
    assert bits_per_weight(plan(SMOL, ATOM)) <= 4.5


def test_bits_are_the_bytes_in_the_files():
    tensors = stored(ATOM, SMOL, DOWN)
    taken = sum(torch.empty(s.shape, dtype=s.dtype).nbytes for s in tensors.values())
    assert bits_by_linear(plan(SMOL, ATOM))[DOWN] == taken * 8 / (576 * 1536)


@pytest.mark.parametrize(
    ("preset", "weights", "activations", "cache"),
    [
        ("fp16", 16.0, 16.0, 16.0),
        # One float16 scale per row: 16 / 4096, 16 / 11008.
        ("w8a8", 8.00336, 8.00275, 16.0),
        ("w4a16", 4.125, 16.0, 16.0),
        ("atom-w4a4kv4", 4.17558, 4.21291, 4.25),
        ("atom-w4a8kv4", 4.17558, 8.125, 4.25),
        # A scale for all normal channels of a token and one for outliers: 32 / 5824 on average.
        # 31 groups of a row: 16 bytes of multiples and a scale, 144 bits, where 248 were for atom.
        ("quatom-w4a8kv4", 4.14937, 8.00549, 4.25),
        ("atom-w3a3", 3.20246, 3.23489, 4.25),
    ],
)
def test_bits_of_llama_7b(preset, weights, activations, cache):
    recipe = PRESETS[preset]
    assert bits_per_weight(plan(LLAMA, recipe)) == pytest.approx(weights, abs=1e-5)
    assert bits_per_activation(plan(LLAMA, recipe)) == pytest.approx(activations, abs=1e-5)
    assert bits_per_kv(plan(LLAMA, recipe)) == cache


def test_float_weights_count_the_bits_of_their_dtype():
    assert bits_per_weight(plan(LLAMA, PRESETS["fp16"]), torch.float32) == 32.0


@pytest.mark.parametrize(
    ("hidden", "channels", "fraction", "outliers"),
    [
        (576, 128, 0.125, 64),
        (896, 128, 0.125, 64),
        (1024, 128, 0.125, 128),
        (4096, 128, 0.125, 128),
        (4096, 96, 0.125, 96),
        (128, 128, 0.125, 32),  # at least 32, although 128 / 8 = 16
        (4096, 0, 0.125, 0),
        (576, 128, 1.0, 128),
    ],
)
def test_outliers_are_capped_by_the_hidden_size(hidden, channels, fraction, outliers):
    recipe = Recipe(outliers=OutlierSpec(channels=channels, max_fraction=fraction))
    assert num_outliers(recipe, hidden) == outliers


def test_groups_of_every_linear_of_llama_7b():
    for site in plan(LLAMA, ATOM).sites():
        layout = site.layout
        assert layout.group_sizes == (128,) * (layout.channels // 128)
        assert layout.outliers == 128


def test_whole_rows_are_one_group():
    assert layout_of(PRESETS["w8a8"], SMOL, DOWN) == GroupLayout(normal=1536, group_size=1536)
    assert layout_of(PRESETS["fp16"], SMOL, DOWN) == GroupLayout(normal=1536, group_size=1536)


def test_row_parallel_layers_have_outliers_in_every_block():
    recipe = replace(ATOM, tensor_parallel=2)
    config = read_config(LLAMA_7B | {"intermediate_size": 8192})
    down = layout_of(recipe, config, DOWN)
    assert down == GroupLayout(normal=7936, group_size=128, outliers=256, outlier_blocks=2)
    assert layout_of(recipe, config, QUERY) == layout_of(ATOM, config, QUERY)
    tensors = stored(recipe, config, "model.layers.0.self_attn.o_proj")
    shapes = {name.rpartition(".")[2]: spec.shape for name, spec in tensors.items()}
    assert shapes["outlier_weight"] == (4096, 256)
    assert shapes["outlier_scale"] == (4096, 2)
    assert shapes["order"] == (4096,)
    # Every axis along K divides, so that a rank's part is a slice.
    assert all(shape[-1] % 2 == 0 for shape in shapes.values())


def test_whole_rows_of_tensor_parallel_blocks_are_one_group_a_block():
    recipe = replace(PRESETS["w8a8"], tensor_parallel=2)
    assert layout_of(recipe, LLAMA, DOWN) == GroupLayout(normal=11008, group_size=5504)


MISFITS = {
    "short group crosses blocks": (
        dict(tensor_parallel=2),
        {},
        r"2048 - 128 outliers = 1920 is not a multiple of group_size 256",
        dict(group_size=256),
    ),
    "blocks do not divide": (
        dict(tensor_parallel=3),
        {},
        r"o_proj has 4096 input channels, which do not divide into tensor_parallel 3",
        {},
    ),
    "heads do not divide": (
        dict(tensor_parallel=64),
        {},
        r"32 attention heads do not divide into tensor_parallel 64",
        {},
    ),
    "no multiple of 32": (
        {},
        dict(intermediate_size=11000),
        r"11000 - 128 outliers leaves 10872 normal channels.*multiple of 32",
        {},
    ),
    "nothing but outliers": (
        dict(outliers=OutlierSpec(channels=128, max_fraction=1.0)),
        dict(intermediate_size=128),
        r"128 - 128 outliers leaves 0 normal channels",
        {},
    ),
    "rows that share scales are cut": (
        dict(tensor_parallel=2),
        {},
        r"2048 input channels in each of 2 .*rows_per_scale 3",
        dict(rows_per_scale=3),
    ),
}


@pytest.mark.parametrize("reason", MISFITS)
def test_a_recipe_that_does_not_fit_is_refused_with_the_numbers(reason):
    recipe_change, config_change, message, weights = MISFITS[reason]
    recipe = replace(ATOM, **recipe_change)
    if weights:
        group_size = weights.get("group_size", 128)
        recipe = replace(
            recipe,
            weights=replace(recipe.weights, **weights),
            activations=replace(recipe.activations, group_size=group_size),
        )
    with pytest.raises(RecipeError, match=message):
        plan(read_config(LLAMA_7B | config_change), recipe)


RECIPES = st.builds(
    lambda fmt, group, rows, channels, wide, blocks: Recipe(
        weights=WeightSpec(format=fmt, group_size=group, rows_per_scale=rows),
        activations=ActivationSpec(group_size=group),
        outliers=OutlierSpec(channels=channels, format=wide if channels else "int8"),
        tensor_parallel=blocks,
    ),
    st.sampled_from(["int2", "int3", "int4", "int5", "int8", "e2m1"]),
    st.sampled_from([-1, 32, 64, 128]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([0, 32, 64, 128]),
    st.sampled_from(["int8", "float16"]),
    st.sampled_from([1, 2, 4]),
)


@settings(deadline=None, max_examples=100)
@given(recipe=RECIPES, tied=st.booleans(), bias=st.booleans(), hidden=st.integers(4, 40))
def test_every_recipe_gives_a_whole_checkpoint_or_an_error(recipe, tied, bias, hidden):
    sizes = {"hidden_size": 32 * hidden, "head_dim": 8 * hidden}
    flags = {"tie_word_embeddings": tied, "attention_bias": bias}
    config = read_config(CONFIG | sizes | flags)
    try:
        resolved = plan(config, recipe)
    except RecipeError:
        return
    tensors = checkpoint_tensors(resolved)
    for name, site in resolved.layers[1].sites.items():
        layout = site.layout
        assert sum(layout.group_sizes) == layout.channels
        assert len(layout.group_sizes) == layout.num_scales
        assert all(size % 32 == 0 for size in layout.group_sizes)
        # A slice for one of B ranks holds whole groups.
        blocks = recipe.tensor_parallel if name in ("o", "down") else 1
        assert layout.num_normal_groups % blocks == 0
        for linear in site.linears:
            packed = tensors[f"{linear.name}.weight_packed"]
            assert packed.shape[1] * 8 == layout.normal * recipe.weights.bits
            gathered = layout.outliers > 0 and name != "down"
            assert (f"{linear.name}.order" in tensors) == gathered
            assert f"{linear.name}.weight" not in tensors
            scale = tensors[f"{linear.name}.weight_scale"]
            assert scale.shape[1] == layout.num_normal_groups
    floats = checkpoint_tensors(plan(config, PRESETS["fp16"]))
    others = {n: s for n, s in floats.items() if not n.endswith("_proj.weight")}
    assert others.items() <= tensors.items()


def test_names_stay_clear_of_what_vllm_drops_or_remaps():
    recipe = replace(ATOM, tensor_parallel=2)
    for name in checkpoint_tensors(plan(LLAMA.with_layers(1), recipe)):
        assert not name.endswith(("g_idx", ".k_scale", ".v_scale", ".kv_scale", ".scales"))
