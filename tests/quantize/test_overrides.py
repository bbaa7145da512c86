"""Recipes whose formats differ by layer and site: packed, loaded and run as they are simulated."""

import json
from dataclasses import replace

import pytest
import torch

from quatom.checkpoint.schema import bits_per_activation, bits_per_kv, bits_per_weight
from quatom.engine.llm import LLM
from quatom.engine.sampling import SamplingParams
from quatom.errors import RecipeError
from quatom.loading import load
from quatom.ops.backend import Backend
from quatom.plan import plan
from quatom.presets import PRESETS
from quatom.quantize.pipeline import quantize_checkpoint
from quatom.recipe import CalibrationSpec, Recipe
from quatom.recipe_file import changed, differences, find_recipe
from quatom.recipe_overrides import (
    ActivationChange,
    KVChange,
    OutlierChange,
    Override,
    WeightChange,
)
from tests.conftest import quick
from tests.quantize.simulation import run_and_record
from tests.quantize.test_one_path import agree

CALIBRATION = CalibrationSpec(num_samples=4, sequence_length=32)
INT8 = ActivationChange(format="int8", group_size=-1, scale_format="float16")
WIDE = WeightChange(format="int8", scale_format="float16")
MORE = OutlierChange(channels=64, max_fraction=1.0)
MIXED = {
    "inputs and weights": (
        Override(layers="0", sites=("down",), activations=INT8),
        Override(layers="0", sites=("qkv", "o"), weights=WIDE),
        Override(layers="1", sites=("gate_up",), weights=WIDE, activations=INT8),
        Override(layers="1", kv_cache=KVChange(format="int8")),
    ),
    "outliers and caches": (
        Override(layers="0", sites=("o",), outliers=OutlierChange(channels=0)),
        Override(layers="0", kv_cache=KVChange(format="float16")),
        Override(layers="1", sites=("qkv", "down"), outliers=MORE),
    ),
    "the later one wins": (
        Override(weights=WIDE, activations=INT8),
        Override(layers="0-1", sites=("o",), weights=replace(WIDE, format="int6")),
        Override(layers="0, 1", kv_cache=KVChange(format="int8")),
    ),
}


def with_overrides(name, overrides):
    return replace(quick(PRESETS[name], CALIBRATION), overrides=overrides)


@pytest.mark.parametrize("name", MIXED)
def test_packed_is_simulated_on_every_cpu_backend(
    name, tiny_llama_dir, text_file, tmp_path, monkeypatch
):
    recipe = with_overrides("quatom-w4a4kv4", MIXED[name])
    quantize_checkpoint(tiny_llama_dir, tmp_path / "q", recipe, calibration=text_file)
    assert load(tmp_path / "q").recipe == recipe
    for backend in (None, Backend.REFERENCE):  # the CPU's own kernel, where it has one
        with monkeypatch.context() as patch:
            agree(tiny_llama_dir, tmp_path / "q", patch, backend=backend)


@pytest.mark.parametrize("name", ["atom-w4a4kv4", "w4a16", "quatom-w4a4kv4-tuned"])
def test_other_bases(name, tiny_llama_dir, text_file, tmp_path, monkeypatch):
    activations = ActivationChange(format="int8", scale_format="float16")
    overrides = (
        Override(layers="0", sites=("qkv",), activations=activations),
        Override(layers="1", kv_cache=KVChange(format="int8")),
        Override(layers="1", outliers=OutlierChange(channels=32)),
    )
    recipe = with_overrides(name, overrides)
    quantize_checkpoint(tiny_llama_dir, tmp_path / "q", recipe, calibration=text_file)
    agree(tiny_llama_dir, tmp_path / "q", monkeypatch)


def test_the_engine_serves_caches_of_several_formats(tiny_llama_dir, text_file, tmp_path):
    recipe = with_overrides("quatom-w4a4kv4", MIXED["inputs and weights"])
    quantize_checkpoint(tiny_llama_dir, tmp_path / "q", recipe, calibration=text_file)
    llm = LLM(tmp_path / "q", max_model_len=128)
    assert [pages.dtype for pages in llm.engine.runner.kv_cache] == ["int4", "int8"]
    prompts = [[1, 2, 3] * 20, [4, 5]]
    options = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    found = [output.token_ids for output in llm.generate(prompts, options)]
    model = load(tmp_path / "q")
    for prompt, tokens in zip(prompts, found, strict=True):
        logits, _ = run_and_record(model, torch.tensor([*prompt, *tokens[:-1]]))
        own = logits[len(prompt) - 1 :].log_softmax(-1)
        chosen = own.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        # Sums in another order round a code on a tie the other way, which moves a few logits by
        # hundredths; a cache read in the wrong format moves them by whole numbers.
        assert (own.amax(-1) - chosen).max() < 0.05


def test_bits_are_those_of_every_place(tiny_llama_dir):
    """256 channels, 384 of down; 32 outliers leave groups of 128 and 96, or 128, 128 and 96."""
    config = load(tiny_llama_dir).config
    base = replace(PRESETS["quatom-w4a4kv4"], overrides=())
    mixed = replace(base, overrides=MIXED["inputs and weights"])
    plain, raised = plan(config, base), plan(config, mixed)
    assert bits_per_kv(raised) == pytest.approx((4.5 + 8.5) / 2)
    # A row of outliers has one scale, and so has the token in INT8.
    int4 = {256: 224 * 4 + 32 * 8 + 3 * 16, 384: 352 * 4 + 32 * 8 + 4 * 16}
    int8 = {256: 256 * 8 + 2 * 16, 384: 384 * 8 + 2 * 16}
    total = 5 * int4[256] + int8[256] + int4[384] + int8[384]
    assert bits_per_activation(raised) == pytest.approx(total / (2 * (3 * 256 + 384)))
    own = {site.title: site for site in raised.sites()}
    assert own["model.layers.0 down"].weights == base.weights
    assert own["model.layers.0 o"].weights.bits == 8
    assert bits_per_weight(raised) > bits_per_weight(plain)


def refused(overrides, base="quatom-w4a4kv4"):
    return changed(PRESETS[base], {"overrides": overrides})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"layers": "0"}, "recipe.overrides must be a list"),
        ([{"colour": 1}], r"unknown keys \['colour'\] in overrides\[0\]"),
        ([{"layers": "0"}], "the override of layers '0' changes nothing"),
        ([{"weights": {}}], "changes nothing"),
        ([{"layers": 3, "weights": {"format": "int8"}}], "overrides.layers must be a string"),
        ([{"layers": "2-1", "weights": {"format": "int8"}}], "ranges like .* got '2-1'"),
        ([{"layers": "", "weights": {"format": "int8"}}], "ranges like .* got ''"),
        ([{"sites": "down", "weights": {"format": "int8"}}], "overrides.sites must be a list"),
        ([{"sites": [1], "weights": {"format": "int8"}}], r"overrides.sites\[0\] must be a string"),
        ([{"sites": ["o"], "kv_cache": {"format": "int8"}}], "whole layers, and sites o are"),
        ([{"kv_cache": {"format": "int9"}}], "overrides.kv_cache.format must be one of"),
        (
            [{"kv_cache": {"format": "int8"}}, {"weights": {"format": "int8"}}],
            r"overrides\[1\]: weights.scale_format 'packed_multiples' .* not int8",
        ),
        ([{"outliers": {"channels": 33}}], r"overrides\[0\]: outliers.channels .* got 33"),
        ([{"activations": {"format": "float16"}}], r"overrides\[0\]: activations.scale_format"),
    ],
)
def test_what_an_override_cannot_say(overrides, message):
    with pytest.raises(RecipeError, match=message):
        refused(overrides)


def test_quantized_and_floating_weights_do_not_mix():
    with pytest.raises(RecipeError, match="all linears hold codes, or none does"):
        refused([{"weights": {"format": "float16"}}], "w4a16")
    with pytest.raises(RecipeError, match="all linears hold codes, or none does"):
        refused([{"weights": {"format": "int4"}}], "fp16")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"layers": "0-2"}, r"overrides\[0\].layers '0-2': the model has layers 0 to 1"),
        ({"sites": ["dwn"]}, r"overrides\[0\].sites names 'dwn'; sites are qkv, o"),
        ({"sites": ["experts_down"]}, "is for experts_down of layers all, .* 0 have that site"),
    ],
)
def test_what_the_model_does_not_have(override, message, tiny_llama_dir, text_file, tmp_path):
    recipe = refused([override | {"outliers": {"channels": 32}}])
    with pytest.raises(RecipeError, match=message):
        quantize_checkpoint(tiny_llama_dir, tmp_path / "q", recipe, calibration=text_file)
    assert list(tmp_path.iterdir()) == []


def test_overrides_that_do_not_go_together(tiny_llama_dir):
    groups = {"weights": {"group_size": 64, "scale_format": "float16"}}
    recipe = refused([groups, {"layers": "1", "activations": {"group_size": 128}}], "w4a16")
    plan(load(tiny_llama_dir).config, recipe)
    recipe = refused(
        [
            {"weights": {"scale_format": "float16", "format": "int8"}},
            {"layers": "1", "sites": ["o"], "weights": {"scale_format": "packed_multiples"}},
        ]
    )
    with pytest.raises(RecipeError, match=r"overrides of layer 1, o: weights.scale_format"):
        plan(load(tiny_llama_dir).config, recipe)


def test_a_recipe_file_has_them(tmp_path):
    own = [{"layers": "0,4-5", "sites": ["o"], "outliers": {"channels": 32}}]
    (tmp_path / "r.json").write_text(json.dumps({"base": "atom-w4a4kv4", "overrides": own}))
    recipe, base = find_recipe(str(tmp_path / "r.json"))
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert differences(recipe, base)["overrides[0]"] == (None, own[0])
    assert differences(base, recipe)["overrides[0]"] == (own[0], None)
    assert [recipe.at(i, "o").outliers.channels for i in range(6)] == [32, 128, 128, 128, 32, 32]
    assert recipe.at(4, "qkv").outliers == base.outliers
