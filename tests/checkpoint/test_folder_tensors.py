"""Names and files of safetensors folders as other tools save them."""

import json

import pytest
import torch
from safetensors.torch import load as parse

from quatom.checkpoint.reader import open_source
from quatom.errors import CheckpointError, ModelError
from quatom.quantize.pipeline import quantize_checkpoint
from tests.checkpoint.models import CONFIG, write_file, write_model
from tests.families.models import save_tiny


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


def test_gpt2_as_the_hub_has_it(tmp_path):
    """Without its head, with causal masks, and weights (input channels, rows)."""
    save_tiny(tmp_path, "gpt2")
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 512, 512) for i in range(2)}
    stored = rewrite(tmp_path, lambda name: name.removeprefix("transformer."), masks)
    source = open_source(tmp_path)
    notes = " ".join(source.notes)
    assert "GPT saved without its head: h.0.attn.bias is read as transformer.h.0.attn.bias" in notes
    assert "transformer.h.0.attn.bias and 1 more passed over" in notes
    for own, theirs in [("attn.c_attn", "attn.c_attn"), ("mlp.c_proj", "mlp.c_proj")]:
        for end in ("weight", "bias"):
            name = f"transformer.h.1.{own}.linear.{end}"
            got = source.load(name, source.shape(name))
            assert torch.equal(got, stored[f"transformer.h.1.{theirs}.{end}"].t())
            assert got.is_contiguous()
    # A tensor of the wrong shape is named with the sizes that are wanted.
    file = tmp_path / "model.safetensors"
    write_file(file, parse(file.read_bytes()) | {"h.1.mlp.c_fc.weight": torch.ones(192, 128)})
    with pytest.raises(CheckpointError, match=r"mlp.c_fc.linear.weight .*\(128, 192\)"):
        open_source(tmp_path)


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


def test_files_that_the_index_does_not_name_are_noted(tmp_path):
    write_model(tmp_path, shards=2)
    (tmp_path / "model-00003-of-00003.safetensors").write_bytes(b"of another model")
    assert open_source(tmp_path).notes == (
        "model-00003-of-00003.safetensors passed over: model.safetensors.index.json does not name "
        "them",
    )


def test_a_tensor_in_two_shards_must_be_the_same_in_both(tmp_path):
    """transformers would take the last one, the index names one of them."""
    write_model(tmp_path, shards=2)
    first, last = sorted(tmp_path.glob("*.safetensors"))
    one, two = parse(first.read_bytes()), parse(last.read_bytes())
    name = next(name for name in one if "proj" in name)
    write_file(last, two | {name: one[name]})
    check(tmp_path, one | two)
    write_file(last, two | {name: one[name] + 1})
    with pytest.raises(
        CheckpointError, match=rf"00001-of.* and .*00002-of.* both hold {name}, with"
    ):
        open_source(tmp_path)


TIED = CONFIG | {"tie_word_embeddings": True}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def test_a_tied_embedding_may_be_stored_as_the_head(tmp_path):
    """What transformers reads."""
    expected = rewrite(write_model(tmp_path, TIED), lambda n: HEAD if n == EMBEDDING else n)
    assert check(tmp_path, expected).notes == (
        f"embedding stored as the head alone: {HEAD} is read as {EMBEDDING}",
    )


def test_a_tied_head_that_differs_and_a_missing_one_say_what_to_set(tmp_path):
    tensors = rewrite(write_model(tmp_path, TIED), lambda n: n)
    head = {HEAD: tensors[EMBEDDING].clone()}
    rewrite(tmp_path, lambda n: n, head)
    check(tmp_path, tensors)
    head[HEAD][3, 4] += 1
    rewrite(tmp_path, lambda n: n, head)
    with pytest.raises(CheckpointError, match=rf"differs from .* to false, or remove {HEAD}$"):
        open_source(tmp_path)
    write_model(tmp_path)
    tensors = parse((tmp_path / "model.safetensors").read_bytes())
    del tensors[HEAD]
    write_file(tmp_path / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"lacks lm_head.*set tie_word_embeddings to true"):
        open_source(tmp_path)


def test_folders_without_a_model_say_what_they_are(tmp_path):
    for name in ("adapter_config.json", "adapter_model.bin"):
        (tmp_path / name).write_text("{}")
        with pytest.raises(CheckpointError, match=r"holds an adapter \(PEFT\) and no model"):
            open_source(tmp_path)
        (tmp_path / name).unlink()
    (tmp_path / "adapter_config.json").write_text("{}")
    write_file(tmp_path / "adapter_model.safetensors", {"a": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"holds an adapter \(PEFT\) and no model"):
        open_source(tmp_path)
    for name in ("consolidated.00.pth", "model.ckpt", "tf_model.h5"):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).touch()
        with pytest.raises(CheckpointError, match=rf"holds only {name}; convert it"):
            open_source(folder)


@pytest.mark.parametrize("never", [-1, 64, 2**40])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_ends_of_text_that_the_model_cannot_write_are_passed_over(file, never, tmp_path):
    """A negative one would forbid the last token, one beyond the vocabulary stop the engine."""
    write_model(tmp_path)
    (tmp_path / file).write_text(
        json.dumps((CONFIG if file == "config.json" else {}) | {"eos_token_id": [2, never]})
    )
    source = open_source(tmp_path)
    assert source.model_config.eos_token_ids == (2,)
    assert source.notes == (f"eos_token_id {never} passed over: the model has 64 tokens",)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [[2]]}')
    with pytest.raises(ModelError, match=r"generation_config.json: eos_token_id must be"):
        open_source(tmp_path)


def test_gpt_neo_as_the_hub_has_it(tmp_path):
    """With causal masks, and what stands for minus infinity."""
    save_tiny(tmp_path, "gpt_neo")
    prefix = "transformer.h.1.attn.attention"
    masks = {f"{prefix}.bias": torch.ones(1, 1, 512, 512), f"{prefix}.masked_bias": torch.ones(())}
    check(tmp_path, rewrite(tmp_path, lambda name: name, masks))


def test_norms_without_weights_have_weights_of_one(tmp_path):
    """OLMo's files hold none; a checkpoint does, for channels are scaled by them."""
    save_tiny(tmp_path / "olmo", "olmo", dtype=torch.bfloat16)
    source = open_source(tmp_path / "olmo")
    name = "model.layers.1.post_attention_layernorm.weight"
    assert (source.shape(name), source.dtype(name)) == ((128,), torch.bfloat16)
    assert torch.equal(source.load(name), torch.ones(128, dtype=torch.bfloat16))
    assert [file.name for file in source.files] == ["model.safetensors"]
    quantize_checkpoint(tmp_path / "olmo", tmp_path / "q", "w8a8", calibration=None)
    with open(tmp_path / "q" / "model.safetensors.index.json") as index:
        assert {name, "model.norm.weight"} <= json.load(index)["weight_map"].keys()
    file = tmp_path / "olmo" / "model.safetensors"
    write_file(file, parse(file.read_bytes()) | {name: torch.ones(128)})
    with pytest.raises(CheckpointError, match=rf"{name}, and norms of family olmo have no weights"):
        open_source(tmp_path / "olmo")
