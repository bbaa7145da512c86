"""`quatom recipes`: presets, files with a base, and what quantize says of a changed recipe."""

import json

import pytest

from quatom.errors import RecipeError
from quatom.presets import DEFAULT_RECIPE, PRESETS
from quatom.quantize.pipeline import quantize_checkpoint
from quatom.recipe import GPTQSpec, NearestSpec, PostRopeKeys, PreRopeKeys, Recipe
from quatom.recipe_file import differences, find_recipe, recipe_from


def test_a_file_starts_from_its_base(tmp_path):
    content = {"base": "quatom-w4a8kv4", "name": "mine", "weights": {"group_size": 64}}
    file = tmp_path / "r.json"
    file.write_text(json.dumps(content))
    recipe, base = find_recipe(str(file))
    assert base == PRESETS["quatom-w4a8kv4"]
    assert recipe.name == "mine"
    assert differences(recipe, base) == {"weights.group_size": (128, 64)}
    assert recipe.kv_cache == base.kv_cache


def test_without_a_base_a_file_starts_from_the_defaults():
    recipe, base = recipe_from({"weights": {"rounder": {"damping": 0.02}}})
    assert (recipe.name, base) == ("custom", Recipe())
    assert recipe.kv_cache.keys == PreRopeKeys()


def test_a_recipe_with_a_base_has_a_name_of_its_own():
    assert recipe_from({"base": "w8a8"})[0].name == "custom"


def test_another_method_than_the_bases_brings_its_own_options():
    gptq = {"base": "w4a16", "weights": {"rounder": {"damping": 0.02}}}
    rounder = recipe_from(gptq)[0].weights.rounder
    assert rounder == GPTQSpec(damping=0.02, column_order="important_first")
    nearest = {"base": "w4a16", "weights": {"rounder": {"method": "nearest"}}}
    recipe, base = recipe_from(nearest)
    assert recipe.weights.rounder == NearestSpec()
    assert differences(recipe, base) == {"weights.rounder.method": ("gptq", "nearest")}
    recipe, base = recipe_from({"base": "quatom-w4a8kv4", "channel_scaling": None})
    assert recipe.channel_scaling is None
    assert differences(recipe, base) == {"channel_scaling": ("balanced", None)}
    assert differences(base, recipe) == {
        "channel_scaling.method": (None, "balanced"),
        "channel_scaling.strength": (None, 0.5),
    }


def test_an_older_file_over_a_base():
    """Files have no format version: the older spelling is read wherever the new one is not."""
    old = {"base": "w4a16", "weights": {"descent_sweeps": 3}, "on_singular": "nearest"}
    assert recipe_from(old)[0].weights.rounder == GPTQSpec(
        descent_sweeps=3, column_order="important_first", on_singular="nearest"
    )
    old = {"base": "quatom-w4a8kv4", "weights": {"rounding": "nearest"}}
    assert recipe_from(old)[0].weights.rounder == NearestSpec()
    old = {"base": "quatom-w4a8kv4", "kv_cache": {"key_offset": "mean"}}
    assert recipe_from(old)[0].kv_cache.keys == PostRopeKeys(rotation="hadamard", offset="mean")
    old = {"base": "quatom-w4a8kv4", "channel_scaling": {"method": "none", "strength": 0.5}}
    assert recipe_from(old)[0].channel_scaling is None


@pytest.mark.parametrize("base", ["quatom-w4a9kv4", 4, None, ["w8a8"]])
def test_an_unknown_base_is_an_error(base):
    with pytest.raises(RecipeError, match="unknown base"):
        recipe_from({"base": base})


def test_a_misspelt_field_over_a_base_is_an_error():
    with pytest.raises(RecipeError, match="grup_size"):
        recipe_from({"base": "w8a8", "weights": {"grup_size": 64}})


@pytest.mark.parametrize("content", ["[]", "3", '{"weights": 4, "base": "w8a8"}', "{"])
def test_a_file_of_something_else_is_one_line(shell, tmp_path, content):
    (tmp_path / "r.json").write_text(content)
    assert "r.json is not a recipe" in shell.fails("recipes", tmp_path / "r.json")


def test_the_list_and_every_preset(shell):
    out = shell("recipes").out
    assert all(name in out for name in PRESETS)
    printed = json.loads(shell("recipes", "--json").out)
    assert {name: Recipe.from_dict(data) for name, data in printed.items()} == PRESETS
    printed = json.loads(shell("recipes", "w8a8", "--json").out)
    assert Recipe.from_dict(printed) == PRESETS["w8a8"]
    assert "weights.clip_search" in shell("recipes", "quatom-w4a8kv4").out


def test_quantize_says_what_is_changed(shell, small_dir, text_file, tmp_path):
    done = shell(
        "quantize", small_dir, tmp_path / "q", "--calibration", text_file,
        "--num-samples", 2, "--sequence-length", 24,
    )  # fmt: skip
    assert done.status == 0, done
    assert f"what differs from the preset {DEFAULT_RECIPE}" in done.out
    assert "calibration.num_samples" in done.out
    assert "weights.format" not in done.out


def test_the_default_recipe_is_the_same_everywhere():
    import inspect

    from quatom.cli.quantize import quantize

    assert inspect.signature(quantize).parameters["recipe"].default == DEFAULT_RECIPE
    assert inspect.signature(quantize_checkpoint).parameters["recipe"].default == DEFAULT_RECIPE
    assert DEFAULT_RECIPE in PRESETS


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("quatom-w4a4", "'quatom-w4a4kv4' or 'quatom-w4a4kv4-tuned'"),
        ("w4a8", "'atom-w4a8kv4' or 'quatom-w4a8kv4'"),
        ("quatom-w4a8kw4", "'quatom-w4a8kv4'"),
        ("Quatom-W4A8KV4", "'quatom-w4a8kv4'"),
        ("smothquant-w8a8", "'smoothquant-w8a8'"),
        ("best", None),
    ],
)
def test_an_unknown_recipe_names_the_nearest(name, meant):
    with pytest.raises(RecipeError) as caught:
        find_recipe(name)
    said = f"(did you mean {meant}?); known are fp16, " if meant else "'best'; known are fp16, "
    assert said in str(caught.value)
