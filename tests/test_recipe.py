"""Recipes: presets, JSON round trips, and every refusal naming the field and its value."""

import json
from dataclasses import FrozenInstanceError, fields, replace
from typing import Literal, get_origin, get_type_hints

import pytest

from quatom.errors import RecipeError
from quatom.presets import PRESETS
from quatom.recipe import (
    FORMAT_VERSION,
    ActivationSpec,
    CalibrationSpec,
    GPTQSpec,
    IncoherenceSpec,
    KVSpec,
    NearestSpec,
    OutlierSpec,
    PostRopeKeys,
    PreRopeKeys,
    Recipe,
    ScalingSpec,
    SplittingSpec,
    WeightSpec,
)
from quatom.recipe_fields import dataclasses_in

PARTS = (
    (("weights",), None, WeightSpec),
    (("weights", "rounder"), "gptq", GPTQSpec),
    (("weights", "rounder"), "nearest", NearestSpec),
    (("activations",), None, ActivationSpec),
    (("kv_cache",), None, KVSpec),
    (("kv_cache", "keys"), "pre_rope", PreRopeKeys),
    (("kv_cache", "keys"), "post_rope", PostRopeKeys),
    (("outliers",), None, OutlierSpec),
    (("calibration",), None, CalibrationSpec),
    (("incoherence",), None, IncoherenceSpec),
    (("channel_scaling",), "balanced", ScalingSpec),
    (("channel_splitting",), None, SplittingSpec),
)
"""Path of an object, the method that makes it one of the class, the class."""


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
    nearest = WeightSpec(rounder=NearestSpec())
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


# As config.json held them: `to_dict` of the default recipe, and of quatom-w4a4kv4.
VERSION_1 = {
    "name": "custom",
    "weights": {
        "format": "int4", "group_size": 128, "rows_per_scale": 2, "clip_ratio": 1.0,
        "clip_search": "mse", "scale_format": "multiples", "rounding": "gptq", "damping": 0.02,
        "column_order": "important_first", "target": "float_input", "target_strength": 0.5,
    },
    "activations": {
        "format": "int4", "group_size": 128, "scale_format": "multiples", "clip_ratio": 0.95,
        "rotation": "hadamard",
    },
    "kv_cache": {
        "format": "int4", "clip_ratio": 1.0, "keys": "post_rope", "rotation": "hadamard",
        "key_offset": "mean", "key_scaling": "balanced", "value_rotation": "hadamard",
    },
    "outliers": {
        "channels": 128, "max_fraction": 0.125, "format": "int8", "metric": "second_moment",
    },
    "calibration": {"num_samples": 128, "sequence_length": 2048, "seed": 0},
    "tensor_parallel": 1,
    "on_singular": "nearest",
    "format_version": 1,
}  # fmt: skip
VERSION_2 = VERSION_1 | {
    "weights": {
        "format": "int8", "group_size": 128, "rows_per_scale": 1, "clip_ratio": 1.0,
        "clip_search": "none", "scale_format": "float16", "rounding": "nearest", "damping": 0.02,
        "column_order": "stored", "descent_sweeps": 0, "target": "own_input",
        "target_strength": 1.0,
    },
    "kv_cache": {
        "format": "int4", "clip_ratio": 1.0, "keys": "pre_rope", "rotation": "none",
        "key_offset": "none", "key_scaling": "none", "value_rotation": "none",
    },
    "channel_scaling": {"method": "none", "strength": 0.5},
    "format_version": 2,
}  # fmt: skip


def test_recipes_of_older_format_versions_are_read_as_they_were_meant():
    recipe = Recipe.from_dict(VERSION_1)
    assert recipe.format_version == FORMAT_VERSION  # what is written from it
    assert recipe.channel_scaling is None
    rounder = GPTQSpec(
        damping=0.02, column_order="important_first", float_target=0.5, on_singular="nearest"
    )
    assert recipe.weights == WeightSpec(
        rows_per_scale=2, clip_search="mse", scale_format="multiples", rounder=rounder
    )
    keys = PostRopeKeys(rotation="hadamard", offset="mean")
    assert recipe.kv_cache == KVSpec(keys=keys, key_scaling="balanced", value_rotation="hadamard")

    recipe = Recipe.from_dict(VERSION_2)
    assert recipe.channel_scaling is None
    assert recipe.weights == WeightSpec(format="int8", rounder=NearestSpec())
    assert recipe.kv_cache == KVSpec()
    scaled = {"channel_scaling": {"method": "balanced", "strength": 0.25}}
    swept = {"weights": VERSION_1["weights"] | {"descent_sweeps": 3}}
    recipe = Recipe.from_dict(VERSION_2 | scaled | swept)
    assert recipe.channel_scaling == ScalingSpec(method="balanced", strength=0.25)
    assert recipe.weights.rounder == replace(rounder, descent_sweeps=3)
    for version in (0, -1, True):
        with pytest.raises(RecipeError, match="format_version"):
            Recipe.from_dict(VERSION_1 | {"format_version": version})


@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        ("weights", "column_order", "important_first", "'column_order'.* of method 'nearest'"),
        ("weights", "descent_sweeps", 2, r"'descent_sweeps'\] in weights.rounder of method"),
        ("weights", "target", "float_input", "'float_target'.* of method 'nearest'"),
        ("weights", "rounding", "gtpq", "weights.rounder.method must be one of .*, got 'gtpq'"),
        ("weights", "bits", 4, r"unknown keys \['bits'\] in weights"),
        ("kv_cache", "key_offset", "mean", r"'offset'\] in kv_cache.keys of method 'pre_rope'"),
        ("kv_cache", "keys", 4, "kv_cache.keys.method must be one of .*, got 4"),
    ],
)
def test_what_older_versions_refused_is_refused(part, field, value, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.from_dict(VERSION_2 | {part: VERSION_2[part] | {field: value}})


def test_the_older_spelling_is_none_of_the_present_version():
    present = {"format_version": FORMAT_VERSION}
    for data, name in (
        ({"weights": {"damping": 0.02}}, "damping"),
        ({"on_singular": "nearest"}, "on_singular"),
        ({"kv_cache": {"rotation": "hadamard"}}, "rotation"),
    ):
        with pytest.raises(RecipeError, match=rf"unknown keys \['{name}'\]"):
            Recipe.from_dict(data | present)
    both = {"weights": {"damping": 0.02, "rounder": {"method": "gptq"}}}
    with pytest.raises(RecipeError, match=r"unknown keys \['damping'\] in weights"):
        Recipe.from_dict(both)


def test_what_incoherence_cannot_stand_beside():
    quip = PRESETS["quip-w4a16"]
    for parts, needed in (
        ({"tensor_parallel": 2}, "tensor_parallel 1"),
        ({"weights": replace(quip.weights, groups="ordered")}, "weights.groups 'consecutive'"),
        ({"weights": replace(quip.weights, format="float16")}, "quantized weights.format"),
        ({"weights": WeightSpec(rounder=GPTQSpec(float_target=0.5))}, "rounder.float_target 0"),
    ):
        with pytest.raises(RecipeError, match=needed):
            replace(quip, **parts)


FLOAT_WEIGHTS = {"weights": {"format": "float16"}, "activations": {"format": "float16"}}


def test_fields_that_say_nothing_are_refused_by_name():
    split = {"channel_splitting": {}, "outliers": {"channels": 0}}
    for data, name, beside in (
        ({"outliers": {"channels": 0, "format": "float16"}}, "outliers.format", "channels 0"),
        ({"outliers": {"channels": 0, "max_fraction": 0.5}}, "outliers.max_fraction", "channels 0"),
        ({"outliers": {"channels": 0, "metric": "abs_mean"}}, "outliers.metric", "consecutive"),
        (FLOAT_WEIGHTS | {"outliers": {"channels": 64}}, "outliers.channels", "weights.format"),
        (FLOAT_WEIGHTS | {"outliers": {"metric": "abs_mean"}}, "outliers.metric", "weights.format"),
        (
            FLOAT_WEIGHTS | {"weights": {"format": "float16", "clip_search": "mse"}},
            "weights.clip_search",
            "weights.format 'float16'",
        ),
        (
            FLOAT_WEIGHTS | {"weights": {"format": "float16", "rounder": {"damping": 0.1}}},
            "weights.rounder with options of gptq",
            "weights.format 'float16'",
        ),
        (
            {"activations": {"format": "float16", "rotation": "hadamard"}},
            "activations.rotation",
            "activations.format 'float16'",
        ),
        (
            {"activations": {"format": "float16", "clip_ratio": 0.9}},
            "activations.clip_ratio",
            "activations.format 'float16'",
        ),
        ({"kv_cache": {"format": "float16", "clip_ratio": 0.9}}, "kv_cache.clip_ratio", "kv_cache"),
        (
            PRESETS["omniquant-w4a16"].to_dict() | {"weights": {"clip_search": "mse"}},
            "weights.clip_search",
            "omniquant",
        ),
        (
            split | {"tuning": {"method": "low_rank"}, "weights": {"clip_search": "mse"}},
            "weights.clip_search 'mse'",
            "low_rank",
        ),
        (
            split | {"outliers": {"channels": 0, "metric": "abs_mean"}},
            "outliers.metric 'abs_mean'",
            "channel_splitting",
        ),
    ):
        with pytest.raises(RecipeError, match=rf"{name}.* has no effect with .*{beside}"):
            Recipe.from_dict(data)


def test_defaults_and_what_is_read_are_not_refused():
    assert Recipe.from_dict(FLOAT_WEIGHTS).outliers == OutlierSpec()  # the default: nobody set it
    assert Recipe.from_dict(FLOAT_WEIGHTS | {"outliers": {"channels": 0}}).outliers.channels == 0
    ordered = {"weights": {"groups": "ordered"}, "outliers": {"channels": 0, "metric": "abs_mean"}}
    assert Recipe.from_dict(ordered).outliers.metric == "abs_mean"


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
        ({"weights": {"rounder": {"damping": 0.0}}}, "weights.rounder.damping .* got 0.0"),
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
            {"weights": {"rounder": {"descent_sweeps": 1, "method": "nearest"}}},
            r"\['descent_sweeps'\] in weights.rounder of method 'nearest'; .* \['method'\]",
        ),
        ({"weights": {"rounder": {"descent_sweeps": -1}}}, "descent_sweeps .* least 0, got -1"),
        ({"weights": {"rounder": {"float_target": 1.5}}}, r"float_target .* \[0, 1\], got 1.5"),
        ({"weights": {"rounder": None}}, "weights.rounder must be an object .* got None"),
        ({"weights": {"rounder": "gptq"}}, "weights.rounder must be an object .* got 'gptq'"),
        (
            {"weights": {"scale_format": "packed_multiples", "format": "int8"}},
            "scale_format 'packed_multiples' .* needs int2, int3 or int4 weights, not int8",
        ),
        (
            {"kv_cache": {"keys": {"offset": "weighted"}}},
            r"\['offset'\] in kv_cache.keys of method 'pre_rope'",
        ),
        (
            {"channel_scaling": {"method": "awq", "strength": 0.0}},
            "channel_scaling.strength .* got 0.0",
        ),
        ({"channel_scaling": {}}, "channel_scaling needs method: balanced, smoothquant, awq"),
        ({"channel_scaling": 4}, "channel_scaling must be an object .* got 4"),
        (
            {"activations": {"rotation": "hadamard", "format": "float16"}},
            "activations.rotation 'hadamard' has no effect with activations.format 'float16'",
        ),
        ({"incoherence": {}}, "incoherence .* it needs activations.format 'float16'"),
        (
            {"incoherence": {}, "activations": {"format": "float16"}},
            "incoherence .* it needs outliers.channels 0",
        ),
        ({"channel_splitting": {}}, "channel_splitting .* it needs outliers.channels 0"),
        ({"channel_splitting": {"largest_share": 0.5}}, r"largest_share must be in \(0, 1/3\]"),
        ({"incoherence": {"seed": 0.5}}, "incoherence.seed must be an integer, got 0.5"),
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
    """(path of the object or (), its tag or None, field, annotation) of all that JSON may set."""
    for path, tag, spec in (((), None, Recipe), *PARTS):
        hints = get_type_hints(spec)
        for f in fields(spec):
            if not dataclasses_in(hints[f.name]):
                yield (path, tag), f.name, hints[f.name]


FIELDS = list(json_fields())


def nested(part, name, value):
    path, tag = part
    inner = {"method": tag, name: value} if tag else {name: value}
    for key in reversed(path):
        inner = {key: inner}
    return inner


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
