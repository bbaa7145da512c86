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
from tests.integrations.checkpoints import tiny_checkpoint, tiny_recipe
from tests.integrations.test_shares import MODEL, rank_rows


def settings(recipe):
    quantization = {"quant_method": "quatom", "recipe": recipe.to_dict()}
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_config=SimpleNamespace(quantization_config=quantization)),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
    )


@pytest.mark.parametrize("base", ["quatom-w4a4kv4", "w4a16"])
def test_vllm_has_one_kv_format(base):
    override = {"layers": "1", "kv_cache": {"format": "int8"}}
    recipe = changed(PRESETS[base], {"overrides": [override]})
    with pytest.raises(RecipeError, match=r"KV caches of formats (int4|float16), int8, and vLLM's"):
        update_settings(settings(recipe))


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
