"""Recipes: presets, JSON round trips, and every refusal naming the field and its value."""

import json
from dataclasses import FrozenInstanceError, fields, is_dataclass, replace
from typing import Literal, get_origin, get_type_hints

import pytest

from quatom.errors import RecipeError
from quatom.presets import PRESETS
from quatom.recipe import (
    FORMAT_VERSION,
    ActivationSpec,
    CalibrationSpec,
    KVSpec,
    OutlierSpec,
    Recipe,
    ScalingSpec,
    WeightSpec,
)

PARTS = {
    "weights": WeightSpec,
    "activations": ActivationSpec,
    "kv_cache": KVSpec,
    "outliers": OutlierSpec,
    "calibration": CalibrationSpec,
    "channel_scaling": ScalingSpec,
}


def test_presets_are_the_promised_ones_under_their_own_names():
    promised = {
        "fp16",
        "w8a8",
        "w4a16",
        "rtn-w4a4",
        "atom-w4a4kv4",
        "atom-w4a8kv4",
        "atom-fp4",
        "atom-w3a3",
    }
    assert promised <= PRESETS.keys()
    assert all(recipe.name == name for name, recipe in PRESETS.items())


@pytest.mark.parametrize(
    ("name", "weights", "activations", "kv", "outliers"),
    [
        ("fp16", 16, 16, 16, 0),
        ("w8a8", 8, 8, 16, 0),
        ("w4a16", 4, 16, 16, 0),
        ("rtn-w4a4", 4, 4, 16, 0),
        ("atom-w4a4kv4", 4, 4, 4, 128),
        ("atom-w4a8kv4", 4, 8, 4, 128),
        ("atom-fp4", 4, 4, 4, 128),
        ("atom-w3a3", 3, 3, 4, 128),
    ],
)
def test_a_presets_name_tells_its_bits(name, weights, activations, kv, outliers):
    recipe = PRESETS[name]
    assert (recipe.weights.bits, recipe.activations.bits, recipe.kv_cache.bits) == (
        weights,
        activations,
        kv,
    )
    assert recipe.outliers.channels == outliers


def test_what_a_recipe_reads_from_text():
    assert not PRESETS["fp16"].quantizes_weights
    assert not PRESETS["rtn-w4a4"].needs_calibration
    assert not PRESETS["w8a8"].needs_calibration
    assert PRESETS["w4a16"].needs_calibration
    assert PRESETS["atom-w4a4kv4"].needs_calibration
    nearest = WeightSpec(rounding="nearest")
    none = OutlierSpec(channels=0)
    assert not Recipe(weights=nearest, outliers=none).needs_calibration
    assert Recipe(weights=nearest).needs_calibration  # orders
    searched = replace(nearest, clip_search="output")
    assert Recipe(weights=searched, outliers=none).needs_calibration


@pytest.mark.parametrize("name", PRESETS)
def test_a_recipe_survives_json(name):
    recipe = PRESETS[name]
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_missing_keys_take_the_defaults():
    assert Recipe.from_dict({}) == Recipe()
    assert Recipe.from_dict({"weights": {"format": "int3"}}).weights == WeightSpec(format="int3")


def test_a_recipe_of_format_version_1_is_read_as_it_was_meant():
    """Before packed multiples, channel scaling, weighted keys and descent."""
    old = PRESETS["quatom-w4a4kv4"].to_dict() | {"format_version": 1}
    del old["channel_scaling"], old["weights"]["descent_sweeps"]
    old["weights"] |= {"scale_format": "multiples", "rows_per_scale": 2}
    old["kv_cache"] |= {"key_offset": "mean", "key_scaling": "balanced"}
    recipe = Recipe.from_dict(old)
    assert recipe.format_version == FORMAT_VERSION  # what is written from it
    assert recipe.channel_scaling.method == "none"
    assert recipe.weights == WeightSpec(
        rows_per_scale=2, clip_search="mse", scale_format="multiples"
    )
    for version in (0, -1, True):
        with pytest.raises(RecipeError, match="format_version"):
            Recipe.from_dict(old | {"format_version": version})


def test_recipes_are_frozen():
    with pytest.raises(FrozenInstanceError):
        PRESETS["w8a8"].name = "other"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"colour": 1}, r"unknown keys \['colour'\] in recipe; known keys are \['activations'"),
        ({"weights": {"bits": 4}}, r"unknown keys \['bits'\] in weights"),
        ({"weights": 4}, "weights must be an object with named fields, got 4"),
        ([1], r"recipe must be an object with named fields, got \[1\]"),
        ("atom", "recipe must be an object with named fields, got 'atom'"),
        (
            {"format_version": FORMAT_VERSION + 1},
            rf"format_version {FORMAT_VERSION + 1}, this Quatom reads up to {FORMAT_VERSION}; upgr",
        ),
        ({"format_version": "1"}, "format_version"),
        ({"weights": {"group_size": 100}}, "weights.group_size .* multiple of 32, got 100"),
        ({"activations": {"group_size": 0}}, "activations.group_size .* got 0"),
        ({"weights": {"group_size": 64}}, "weights.group_size 64 and activations.group_size 128"),
        ({"weights": {"group_size": -1}}, "weights.group_size -1 and activations.group_size 128"),
        ({"weights": {"format": "float16"}}, "activations are int4 but weights float16"),
        ({"weights": {"clip_ratio": 0.0}}, r"weights.clip_ratio must be in \(0, 1\], got 0.0"),
        ({"activations": {"clip_ratio": 1.5}}, "activations.clip_ratio .* got 1.5"),
        ({"kv_cache": {"clip_ratio": -1}}, "kv_cache.clip_ratio .* got -1"),
        ({"weights": {"rows_per_scale": 0}}, "rows_per_scale must be at least 1, got 0"),
        ({"weights": {"damping": 0.0}}, "damping .* got 0.0"),
        (
            {"weights": {"scale_format": "multiples", "format": "int8"}},
            "scale_format 'multiples' .* needs int2, int3 or int4 weights, not int8",
        ),
        (
            {"activations": {"scale_format": "multiples", "format": "e4m3"}},
            "scale_format 'multiples' .* needs int2, int3 or int4 activations, not e4m3",
        ),
        (
            {"activations": {"scale_format": "multiples", "group_size": -1}},
            "activations.group_size -1 has one scale",
        ),
        (
            {"weights": {"descent_sweeps": 1, "rounding": "nearest"}},
            "weights.descent_sweeps 1 .* needs weights.rounding 'gptq'",
        ),
        ({"weights": {"descent_sweeps": -1}}, "weights.descent_sweeps -1 must be at least 0"),
        (
            {"weights": {"scale_format": "packed_multiples", "format": "int8"}},
            "scale_format 'packed_multiples' .* needs int2, int3 or int4 weights, not int8",
        ),
        ({"kv_cache": {"key_offset": "weighted"}}, "'weighted' .* kv_cache.keys 'post_rope'"),
        ({"channel_scaling": {"strength": 0.0}}, "channel_scaling.strength .* got 0.0"),
        ({"kv_cache": {"rotation": "hadamard"}}, "needs kv_cache.keys 'post_rope'"),
        (
            {"activations": {"rotation": "hadamard", "format": "float16"}},
            "activations.rotation 'hadamard' .* quantized activations.format",
        ),
        (
            {"weights": {"target": "float_input", "rounding": "nearest"}},
            "weights.target 'float_input' .* needs weights.rounding 'gptq'",
        ),
        ({"outliers": {"channels": 100}}, "outliers.channels .* multiple of 32, got 100"),
        ({"outliers": {"channels": -32}}, "outliers.channels .* got -32"),
        ({"outliers": {"max_fraction": 2.0}}, "outliers.max_fraction .* got 2.0"),
        ({"calibration": {"num_samples": 0}}, "got 0 of 2048"),
        ({"calibration": {"sequence_length": 1}}, "got 128 of 1"),
        ({"tensor_parallel": 0}, "tensor_parallel must be at least 1, got 0"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_value(data, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.from_dict(data)


def json_fields():
    """(part or None, field, annotation) of everything a recipe's JSON may set."""
    for part, spec in {None: Recipe, **PARTS}.items():
        hints = get_type_hints(spec)
        for f in fields(spec):
            if not is_dataclass(hints[f.name]):
                yield part, f.name, hints[f.name]


FIELDS = list(json_fields())


def nested(part, name, value):
    return {name: value} if part is None else {part: {name: value}}


@pytest.mark.parametrize(
    ("part", "name"), [(p, n) for p, n, hint in FIELDS if get_origin(hint) is Literal]
)
def test_a_misspelt_choice_is_no_other_choice(part, name):
    """Each choice is tested with ==: an unknown word would be taken for one of the others."""
    for wrong in ("int44", None, 4, "GPTQ"):
        with pytest.raises(RecipeError, match=rf"{name} must be one of .*, got {wrong!r}"):
            Recipe.from_dict(nested(part, name, wrong))


@pytest.mark.parametrize(
    ("part", "name"), [(p, n) for p, n, hint in FIELDS if hint in (int, float)]
)
def test_numbers_are_numbers(part, name):
    for wrong in ("128", None, True, [1]):
        with pytest.raises(RecipeError, match=name):
            Recipe.from_dict(nested(part, name, wrong))


@pytest.mark.parametrize(("part", "name"), [(p, n) for p, n, hint in FIELDS if hint is int])
def test_counts_are_whole_numbers(part, name):
    with pytest.raises(RecipeError, match=name):
        Recipe.from_dict(nested(part, name, 64.0))
