"""Names and files of safetensors folders as other tools save them."""

import json

import pytest
import torch
from safetensors.torch import load as parse

from quatom.checkpoint.reader import open_source
from quatom.errors import CheckpointError
from tests.checkpoint.models import CONFIG, write_file, write_model


def rewrite(folder, rename, extra=()):
    """The same model under other names; returns what reading must give."""
    file = folder / "model.safetensors"
    tensors = parse(file.read_bytes())
    write_file(file, {rename(name): t for name, t in tensors.items()} | dict(extra))
    return tensors


def check(folder, expected):
    source = open_source(folder)
    assert set(source.names()) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(source.load(name), tensor), name
    return source


PREFIXES = {
    "compiled": lambda n: f"_orig_mod.{n}",
    "compiled blocks": lambda n: n.replace(".self_attn.", "._orig_mod.self_attn."),
    "data parallel": lambda n: f"module.{n}",
    "data parallel, compiled": lambda n: f"_orig_mod.module.{n}",
    "an adapter's base": lambda n: f"base_model.model.{n}",
    "language part": lambda n: f"language_model.{n}",
    "language part in transformers 5": lambda n: n.replace("model.", "model.language_model.", 1),
}


@pytest.mark.parametrize("kind", PREFIXES)
def test_known_prefixes_are_taken_off(kind, tmp_path):
    expected = rewrite(write_model(tmp_path), PREFIXES[kind])
    source = check(tmp_path, expected)
    assert len(source.notes) == 1
    assert "is read as " in source.notes[0]


def test_a_model_saved_without_its_head(tmp_path):
    tied = CONFIG | {"tie_word_embeddings": True}
    expected = rewrite(write_model(tmp_path, tied), lambda n: n.removeprefix("model."))
    assert "model saved without its head" in check(tmp_path, expected).notes[0]


def test_the_language_part_of_a_larger_model(tmp_path):
    extra = {"vision_tower.patch.weight": torch.ones(3), "multi_modal_projector.w": torch.ones(2)}
    expected = rewrite(write_model(tmp_path), PREFIXES["language part"], extra)
    notes = " ".join(check(tmp_path, expected).notes)
    assert "vision_tower.patch.weight" in notes or "multi_modal_projector.w" in notes


def test_names_that_fall_together_are_refused(tmp_path):
    expected = write_model(tmp_path)
    twice = {
        f"_orig_mod.{n}": t for n, t in parse((expected / "model.safetensors").read_bytes()).items()
    }
    twice["model.norm.weight"] = torch.zeros(128)
    write_file(tmp_path / "model.safetensors", twice)
    with pytest.raises(CheckpointError, match=r"holds both .*model.norm.weight and .*remove one"):
        open_source(tmp_path)


def test_unknown_prefixes_and_adapters_are_refused(tmp_path):
    rewrite(write_model(tmp_path), lambda n: f"wrapped.{n}")
    with pytest.raises(CheckpointError, match=r"lacks model\..* \(21 of 21"):
        open_source(tmp_path)
    write_model(tmp_path)
    lora = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 128)}
    named = "self_attn.q_proj.base_layer.weight"
    rewrite(
        tmp_path,
        lambda n: "base_model.model." + n.replace("self_attn.q_proj.weight", named),
        lora,
    )
    with pytest.raises(CheckpointError, match=r"\(1 such tensors\): adapters .* merge_and_unload"):
        open_source(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"holds an adapter \(PEFT\) and no model; merge it"):
        open_source(tmp_path)


def test_buffers_that_no_result_depends_on_are_passed_over(tmp_path):
    block = "model.layers.0.self_attn"
    extra = {
        f"{block}.rotary_emb.inv_freq": torch.ones(16),
        f"{block}.rotary_emb.cos_cached": torch.ones(16),
        f"{block}.masked_bias": torch.tensor(-1e9),
        f"{block}.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
        "model.position_ids": torch.arange(8)[None],
    }
    expected = rewrite(write_model(tmp_path), lambda n: n, extra)
    source = check(tmp_path, expected)
    assert "and 4 more passed over" in source.notes[0]
    rewrite(tmp_path, lambda n: n, {f"{block}.bias": torch.ones(128)})
    with pytest.raises(CheckpointError, match=rf"holds {block}.bias \(1 such"):
        open_source(tmp_path)


def test_one_file_goes_before_an_index_of_old_shards(tmp_path):
    """What transformers takes."""
    import transformers

    old = write_model(tmp_path, shards=2)
    write_model(tmp_path / "new")
    expected = parse((tmp_path / "new" / "model.safetensors").read_bytes())
    expected = {name: tensor + 1 for name, tensor in expected.items()}
    write_file(old / "model.safetensors", expected)
    source = check(tmp_path, expected)
    assert source.notes == (
        "model-00001-of-00002.safetensors, model-00002-of-00002.safetensors, "
        "model.safetensors.index.json passed over: model.safetensors goes first",
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_a_folder_with_files_of_other_names_says_which(tmp_path):
    write_model(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"neither .* \(it has weights.safetensors\)"):
        open_source(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(CheckpointError, match=r"asks for 2 blocks and there are 0 tensors"):
        open_source(tmp_path)
