"""Formats that differ by layer and site, in tools whose formats do not: refused by name."""

from types import SimpleNamespace

import pytest

from quatom.checkpoint.compressed_tensors import export_compressed_tensors
from quatom.errors import RecipeError
from quatom.families.registry import read_config
from quatom.integrations.vllm.settings import update_settings
from quatom.integrations.vllm.shares import share_of
from quatom.plan import plan
from quatom.presets import PRESETS
from quatom.recipe_file import changed
from tests.families.models import tiny_config
from tests.integrations.checkpoints import tiny_checkpoint, tiny_recipe
from tests.integrations.test_shares import MODEL, rank_rows


def settings(recipe):
    quantization = {"quant_method": "quatom", "recipe": recipe.to_dict()}
    return SimpleNamespace(
        model_config=SimpleNamespace(
            model="folder", hf_config=SimpleNamespace(quantization_config=quantization)
        ),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, data_parallel_size=1),
    )


def reads(monkeypatch, family):
    """A folder that holds the tiny model of a family."""
    config = read_config(tiny_config(family).to_dict())
    place = "quatom.integrations.vllm.settings.read_model_config"
    monkeypatch.setattr(place, lambda _: (config, None))


@pytest.mark.parametrize("family", ["ministral3", "mistral"])
def test_vllm_is_told_how_queries_grow(family, monkeypatch):
    reads(monkeypatch, family)
    ours = settings(PRESETS["w8a8"])
    update_settings(ours)
    found = getattr(ours.model_config.hf_config, "llama_4_scaling", None)
    grows = {"beta": 0.5, "original_max_position_embeddings": 16}
    assert found == (grows if family == "ministral3" else None)


@pytest.mark.parametrize(
    ("base", "override", "message"),
    [
        (
            "quatom-w4a4kv4",
            {"kv_cache": {"format": "int8"}},
            "KV caches of formats int4, int8, and",
        ),
        ("w4a16", {"kv_cache": {"format": "int8"}}, "KV caches of formats float16, int8, and"),
        ("w4a16", {"activations": {"format": "int8"}}, "activations of formats float16, int8, and"),
    ],
)
def test_vllm_has_one_of_some_things(base, override, message, monkeypatch):
    reads(monkeypatch, "llama")
    recipe = changed(PRESETS[base], {"overrides": [{"layers": "1"} | override]})
    with pytest.raises(RecipeError, match=message):
        update_settings(settings(recipe))


def test_vllm_takes_other_formats_of_quantized_inputs():
    from quatom.integrations.vllm.settings import _check_overrides

    wide = {"format": "int8", "group_size": -1, "scale_format": "float16"}
    _check_overrides(changed(PRESETS["quatom-w4a4kv4"], {"overrides": [{"activations": wide}]}))


def test_a_rank_of_vllm_quantizes_its_part_as_the_site_says():
    base = tiny_recipe("atom-w4a4kv4", tensor_parallel=2)
    wide = {"format": "int8", "group_size": -1}
    override = {"layers": "1", "sites": ["down"], "activations": wide}
    recipe = changed(base, {"overrides": [override]})
    for layer in plan(read_config(MODEL), recipe).layers:
        for name in ("o", "down"):
            site = layer.sites[name]
            share = share_of(layer, site, recipe, partitions=rank_rows(site, 2), rank=0, degree=2)
            own = share.site.input_spec
            assert own.layout.channels == site.channels // 2
            raised = layer.index == 1 and name == "down"
            assert own.normal == ("int8" if raised else "int4")
            assert own.scale_mode == ("row" if raised else "group")


def test_compressed_tensors_has_one_format(tiny_llama_dir, text_file, tmp_path):
    override = {"layers": "0", "sites": ["down"], "weights": {"format": "int8"}}
    recipe = changed(tiny_recipe("w4a16"), {"overrides": [override]})
    folder = tiny_checkpoint(tmp_path, tiny_llama_dir, recipe, text_file)
    with pytest.raises(RecipeError, match="cannot say overrides of recipe w4a16"):
        export_compressed_tensors(folder, tmp_path / "ct")
