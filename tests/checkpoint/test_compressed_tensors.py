"""`quatom export --format compressed-tensors`: the same weights in another form."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

from quatom.checkpoint.compressed_tensors import export_compressed_tensors
from quatom.checkpoint.reader import open_source
from quatom.cli.main import app
from quatom.errors import CheckpointError, RecipeError
from quatom.recipe import SplittingSpec
from tests.integrations.checkpoints import family_checkpoint, tiny_checkpoint, tiny_recipe

LINEAR = "model.layers.1.mlp.gate_proj"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_llama_dir, text_file):
    folder = tmp_path_factory.mktemp("checkpoints")
    return lambda name: tiny_checkpoint(folder, tiny_llama_dir, tiny_recipe(name), text_file)


def read(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = {}
    for name, file in index.items():
        with safe_open(folder / file, "pt") as held:
            tensors[name] = held.get_tensor(name)
    return tensors


def test_w4a16_words_hold_eight_codes_each(checkpoint, tmp_path):
    source = open_source(checkpoint("w4a16"))
    target = export_compressed_tensors(checkpoint("w4a16"), tmp_path / "ct")
    tensors = read(target)
    words = tensors[f"{LINEAR}.weight_packed"].numpy().astype(np.uint32)
    codes = np.stack([(words >> 4 * i) & 15 for i in range(8)], axis=-1).reshape(len(words), -1)
    stored = source.load(f"{LINEAR}.weight_packed").numpy()
    ours = np.stack((stored & 15, stored >> 4), axis=-1).reshape(len(stored), -1).astype(int)
    assert np.array_equal(codes.astype(int) - 8, ours - 16 * (ours > 7))
    assert torch.equal(tensors[f"{LINEAR}.weight_scale"], source.load(f"{LINEAR}.weight_scale"))
    assert tensors[f"{LINEAR}.weight_shape"].tolist() == list(codes.shape)
    config = json.loads((target / "config.json").read_text())
    assert "attn_implementation" not in config
    group = config["quantization_config"]["config_groups"]["group_0"]
    assert group["weights"]["group_size"] == 128
    assert group["input_activations"] is None


def test_w8a8_codes_are_bytes_and_all_else_is_copied(checkpoint, tmp_path):
    folder = checkpoint("w8a8")
    source = open_source(folder)
    tensors = read(export_compressed_tensors(folder, tmp_path / "ct"))
    stored = source.load(f"{LINEAR}.weight_packed")
    assert torch.equal(tensors[f"{LINEAR}.weight"], stored.view(torch.int8))
    assert tensors[f"{LINEAR}.weight_scale"].shape == (stored.shape[0], 1)
    for name in ("model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"):
        assert torch.equal(tensors[name], source.load(name))
    assert (tmp_path / "ct" / "tokenizer.json").exists()


def test_recipes_that_cannot_be_said_are_refused_by_what_cannot(
    checkpoint, tiny_llama_dir, text_file, tmp_path
):
    with pytest.raises(RecipeError, match=r"outliers.channels 128, .*kv_cache.format int4"):
        export_compressed_tensors(checkpoint("quatom-w4a8kv4"), tmp_path / "ct")
    with pytest.raises(RecipeError, match=r"weights.format odd4, .*incoherence"):
        export_compressed_tensors(checkpoint("quip-w4a16"), tmp_path / "ct")
    split = replace(tiny_recipe("w8a8"), name="split", channel_splitting=SplittingSpec())
    folder = tiny_checkpoint(tmp_path.parent, tiny_llama_dir, split, text_file)
    with pytest.raises(RecipeError, match="cannot say channel_splitting"):
        export_compressed_tensors(folder, tmp_path / "ct")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("gpt2", "weights that this family's files hold transposed"),
        ("cohere", "the order of channels of this family's heads"),  # neighbours turn
        ("falcon-groups", "the order of channels of this family's heads"),  # rows by KV head
    ],
)
def test_families_whose_files_differ_otherwise_are_refused(family, words, text_file, tmp_path):
    folder = family_checkpoint(tmp_path.parent, family, "w8a8", text_file)
    with pytest.raises(RecipeError, match=words):
        export_compressed_tensors(folder, tmp_path / "ct")


def test_the_command_writes_it_once(checkpoint, tiny_llama_dir, tmp_path):
    words = ["export", str(checkpoint("w8a8")), str(tmp_path / "ct")]
    assert CliRunner().invoke(app, words).exit_code == 0
    with pytest.raises(CheckpointError, match="exists; choose another target or delete it"):
        export_compressed_tensors(checkpoint("w8a8"), tmp_path / "ct")
    with pytest.raises(CheckpointError, match="is no Quatom checkpoint"):
        export_compressed_tensors(tiny_llama_dir, tmp_path / "other")
