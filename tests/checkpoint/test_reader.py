"""The reader: what is on disk comes back, and every kind of damage is an error that names it."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open

from quatom.checkpoint import validation
from quatom.checkpoint.reader import open_source
from quatom.checkpoint.schema import checkpoint_tensors
from quatom.errors import CheckpointError, ModelError, QuatomError, RecipeError
from quatom.families.registry import read_config
from quatom.plan import plan
from quatom.presets import PRESETS
from tests.checkpoint.models import CONFIG, replace_tensors, write_file, write_model

ATOM = PRESETS["atom-w4a4kv4"]
QUERY = "model.layers.0.self_attn.q_proj"
TIED = CONFIG | {"tie_word_embeddings": True}


def quatom_config(recipe=ATOM):
    quantization = {"quant_method": "quatom", "recipe": recipe.to_dict()}
    return CONFIG | {"quantization_config": quantization}


def edit_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_tensors_equal_what_safetensors_reads(tmp_path, shards, dtype):
    source = open_source(write_model(tmp_path, dtype=dtype, shards=shards))
    assert source.recipe is None
    assert source.gguf is None
    assert source.model_config == read_config(CONFIG)
    seen = set()
    for file in tmp_path.glob("*.safetensors"):
        with safe_open(file, "pt") as theirs:
            for name in theirs.keys():  # noqa: SIM118  (no dict)
                seen.add(name)
                tensor = source.load(name, source.shape(name))
                assert tensor.dtype == source.dtype(name) == dtype
                assert torch.equal(tensor, theirs.get_tensor(name))
    assert seen == set(source.names())


def test_what_transformers_saves_is_read(tiny_qwen2_dir):
    source = open_source(tiny_qwen2_dir)
    layer = source.model_config.layers[0]
    assert all(linear.bias for linear in layer.linears["qkv"])
    assert "lm_head.weight" not in source.names()  # tied
    assert source.load(f"{QUERY}.bias").shape == (layer.attention.num_heads * 64,)


def test_a_loaded_tensor_is_not_tied_to_the_file(tmp_path):
    source = open_source(write_model(tmp_path))
    tensor = source.load("model.norm.weight")
    tensor.zero_()
    assert source.load("model.norm.weight").abs().sum() > 0
    shutil.rmtree(tmp_path)
    assert tensor.sum() == 0


def test_a_quatom_checkpoint(tmp_path):
    source = open_source(write_model(tmp_path, quatom_config(), recipe=ATOM))
    assert source.recipe == ATOM
    expected = checkpoint_tensors(plan(source.model_config, ATOM))
    assert source.names() == list(expected)
    assert source.load(f"{QUERY}.weight_packed").dtype == torch.uint8
    assert source.dtype(f"{QUERY}.order") == torch.int32


def test_generation_config_adds_tokens_that_end_a_turn(tmp_path):
    write_model(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    assert open_source(tmp_path).model_config.eos_token_ids == (2, 5)


def test_rotary_frequencies_of_old_checkpoints_are_ignored(tmp_path):
    write_model(tmp_path)
    extra = {"model__layers__0__self_attn__rotary_emb__inv_freq": torch.ones(16)}
    replace_tensors(tmp_path / "model.safetensors", **extra)
    assert len(open_source(tmp_path).names()) == 21


def test_a_stored_head_that_equals_its_tied_embedding_is_ignored(tmp_path, monkeypatch):
    monkeypatch.setattr(validation, "_CHUNK", 1000)  # the difference lies in one piece of many
    write_model(tmp_path, TIED)
    embedding = open_source(tmp_path).load("model.embed_tokens.weight")
    replace_tensors(tmp_path / "model.safetensors", lm_head__weight=embedding)
    assert "lm_head.weight" not in open_source(tmp_path).names()
    embedding[3, 5] += 1
    replace_tensors(tmp_path / "model.safetensors", lm_head__weight=embedding)
    with pytest.raises(CheckpointError, match=r"differs from model.embed_tokens.weight"):
        open_source(tmp_path)


def test_fingerprint_changes_with_weights_and_configuration_only(tmp_path):
    first = open_source(write_model(tmp_path / "a")).fingerprint()
    assert open_source(write_model(tmp_path / "b")).fingerprint() == first
    replace_tensors(tmp_path / "b" / "model.safetensors", model__norm__weight=torch.ones(128))
    assert open_source(tmp_path / "b").fingerprint() != first
    edit_json(tmp_path / "a" / "config.json", rope_theta=5.0)
    assert open_source(tmp_path / "a").fingerprint() != first


def truncate(folder):
    file = folder / "model-00002-of-00003.safetensors"
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 100)


def damage_header(folder):
    with (folder / "model-00001-of-00003.safetensors").open("r+b") as stream:
        stream.seek(9)
        stream.write(b"!!")


def shorten_to_nothing(folder):
    (folder / "model-00001-of-00003.safetensors").write_bytes(b"\x10\0\0")


def drop_from_shard(folder):
    replace_tensors(folder / "model-00003-of-00003.safetensors", model__norm__weight=None)


def drop_everywhere(folder):
    drop_from_shard(folder)
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    del weight_map["model.norm.weight"]
    edit_json(index, weight_map=weight_map)


def change(**tensors):
    return lambda folder: replace_tensors(folder / "model-00003-of-00003.safetensors", **tensors)


def name_shard(folder, name):
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map=weight_map | {"model.norm.weight": name})


DAMAGES = {
    "missing shard": (
        lambda f: (f / "model-00002-of-00003.safetensors").unlink(),
        r"lacks the shard model-00002-of-00003.safetensors with 7 of 21 tensors; download it",
    ),
    "shard outside the folder": (
        lambda f: name_shard(f, "../x.safetensors"),
        r"index.json: weight_map must give .* it gives '../x.safetensors' for model.norm.weight",
    ),
    "shard by an absolute path": (
        lambda f: name_shard(f, "/x.safetensors"),
        r"it gives '/x.safetensors' for model.norm.weight",
    ),
    "shard that is a number": (
        lambda f: name_shard(f, 3),
        r"weight_map must give each tensor the name of a file in the folder, it gives 3 for",
    ),
    "shard that is a list": (lambda f: name_shard(f, ["a"]), r"it gives \['a'\] for"),
    "shard that is the parent": (lambda f: name_shard(f, ".."), r"it gives '..' for"),
    "shard without a name": (lambda f: name_shard(f, ""), r"it gives '' for"),
    "truncated shard": (
        truncate,
        r"model-00002-of-00003.safetensors is truncated .*describes \d+ bytes, the file has \d+",
    ),
    "damaged header": (damage_header, r"model-00001.*damaged safetensors header"),
    "empty file": (shorten_to_nothing, r"model-00001.*truncated or no safetensors file"),
    "tensor not in its shard": (
        drop_from_shard,
        r"model-00003-of-00003.safetensors lacks model.norm.weight, which .*index.json promises",
    ),
    "missing tensor": (drop_everywhere, r"lacks model.norm.weight \(1 of 21 tensors are missing\)"),
    "wrong shape": (
        change(model__norm__weight=torch.ones(127)),
        r"model.norm.weight has shape \(127,\), config.json asks for \(128,\)",
    ),
    "wrong dtype": (
        change(model__norm__weight=torch.ones(128, dtype=torch.float64)),
        r"model.norm.weight is float64, expected float16 or bfloat16 or float32",
    ),
    "index without map": (
        lambda f: (f / "model.safetensors.index.json").write_text("{}"),
        r"index.json has no weight_map",
    ),
    "config is no JSON": (
        lambda f: (f / "config.json").write_text("{"),
        r"config.json is no valid JSON",
    ),
    "config is a list": (
        lambda f: (f / "config.json").write_text("[]"),
        r"config.json must hold an object, it holds a list",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), r"has no config.json; copy the model's"),
    "another architecture": (
        lambda f: edit_json(f / "config.json", architectures=["OtherLMHeadModel"]),
        r"config.json: architecture OtherLMHeadModel is not supported",
    ),
    "a key that changes the mathematics": (
        lambda f: edit_json(f / "config.json", hidden_act="mish"),
        r"config.json: config key hidden_act = 'mish' is not supported",
    ),
    "a number of blocks that is damaged": (
        lambda f: edit_json(f / "config.json", num_hidden_layers=2**40),
        r"config.json: num_hidden_layers 1099511627776 is above 1000",
    ),
    "more blocks than tensors": (
        lambda f: edit_json(f / "config.json", num_hidden_layers=30),
        r"asks for 30 blocks and there are 21 tensors in all",
    ),
    "quantized by others": (
        lambda f: edit_json(f / "config.json", quantization_config={"quant_method": "awq"}),
        r"quant_method 'awq' is not supported; `quatom import` makes a Quatom checkpoint of it",
    ),
    "quantized by others, to the last": (
        lambda f: edit_json(
            f / "config.json", quantization_config={"quant_method": "bitsandbytes"}
        ),
        r"quant_method 'bitsandbytes' is not supported; use the floating-point model",
    ),
    "integers in compressed-tensors": (
        lambda f: edit_json(
            f / "config.json", quantization_config={"quant_method": "compressed-tensors"}
        ),
        r"another format than FP8 \(e4m3\) is not supported; `quatom import` makes",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_an_error_of_one_line_at_opening(tmp_path, damage):
    write_model(tmp_path, shards=3)
    spoil, message = DAMAGES[damage]
    spoil(tmp_path)
    with pytest.raises((CheckpointError, ModelError), match=message) as caught:
        open_source(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_tensor_the_model_does_not_have_is_refused(tmp_path):
    write_model(tmp_path)
    replace_tensors(tmp_path / "model.safetensors", model__q_norm__weight=torch.ones(2))
    with pytest.raises(CheckpointError, match=r"holds model.q_norm.weight \(1 such tensors\)"):
        open_source(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_numbers_that_are_not_finite_are_refused(tmp_path, value, dtype):
    write_model(tmp_path, dtype=dtype)
    weight = torch.ones(64, 128, dtype=dtype)
    weight[5, 7] = weight[6, 0] = value
    replace_tensors(tmp_path / "model.safetensors", lm_head__weight=weight)
    source = open_source(tmp_path)
    with pytest.raises(CheckpointError, match=r"model.safetensors: tensor lm_head.weight holds 2 "):
        source.load("lm_head.weight")


def test_a_file_that_shrinks_after_opening(tmp_path):
    source = open_source(write_model(tmp_path))
    with (tmp_path / "model.safetensors").open("r+b") as stream:
        stream.truncate(4000)
    with pytest.raises(CheckpointError, match=r"is truncated: bytes .* the file has 4000"):
        source.load("model.norm.weight")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"cannot read .*model.safetensors: No such file"):
        source.load("model.norm.weight")


def test_asking_for_what_is_not_there(tmp_path):
    source = open_source(write_model(tmp_path))
    for ask in (source.load, source.shape, source.dtype):
        with pytest.raises(CheckpointError, match=r"has no tensor model.nothing"):
            ask("model.nothing")
    with pytest.raises(CheckpointError, match=r"has shape \(128,\), expected \(64,\)"):
        source.load("model.norm.weight", (64,))


def test_quatom_checkpoints_are_checked_against_their_recipe(tmp_path):
    write_model(tmp_path, quatom_config(), recipe=ATOM)
    file = tmp_path / "model.safetensors"
    codes = {f"{QUERY}.order".replace(".", "__"): torch.zeros(128, dtype=torch.int64)}
    replace_tensors(file, **codes)
    with pytest.raises(CheckpointError, match=r"q_proj.order is int64, expected int32"):
        open_source(tmp_path)
    other = quatom_config(PRESETS["w8a8"])["quantization_config"]
    edit_json(tmp_path / "config.json", quantization_config=other)
    with pytest.raises(CheckpointError, match=r"holds .*q_proj.order .40 such tensors."):
        open_source(tmp_path)
    newer = {"quant_method": "quatom", "recipe": ATOM.to_dict() | {"format_version": 99}}
    edit_json(tmp_path / "config.json", quantization_config=newer)
    with pytest.raises(RecipeError, match=r"format_version 99"):
        open_source(tmp_path)
    edit_json(tmp_path / "config.json", quantization_config={"quant_method": "quatom"})
    with pytest.raises(CheckpointError, match=r"has no recipe"):
        open_source(tmp_path)


def test_places_that_hold_no_model(tmp_path):
    places = {
        "nowhere": "does not exist",
        "a/b/c": "does not exist",
        "empty": "no weights: a .*safetensors or .*gguf file is needed",
        "torch": "only pytorch_model.bin; convert it to safetensors",
        "text.txt": "is a file; give the folder",
        "two": r"holds 2 .gguf files \(a.gguf, b.gguf",
        "half": "has neither model.safetensors nor model.safetensors.index.json",
    }
    for name, file in {
        "torch": "pytorch_model.bin",
        "two": "a.gguf",
        "half": "config.json",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}")
    (tmp_path / "two" / "b.gguf").touch()
    write_file(tmp_path / "half" / "consolidated.safetensors", {"x": torch.ones(1)})
    write = tmp_path / "half" / "config.json"
    write.write_text(json.dumps(CONFIG))
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").touch()
    for name, message in places.items():
        with pytest.raises(QuatomError, match=message):
            open_source(tmp_path / name)


@pytest.mark.parametrize("quantization", [None, {}])
def test_a_quantization_config_that_says_nothing_is_none(quantization, tmp_path):
    write_model(tmp_path)
    edit_json(tmp_path / "config.json", quantization_config=quantization)
    assert open_source(tmp_path).recipe is None
