"""Routed experts are read from files with one tensor per expert, and from files with all in one."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from quatom.checkpoint.reader import open_source
from quatom.errors import CheckpointError
from quatom.loading import load
from tests.families.models import TINY, save_tiny, tiny_model

FAMILIES = (
    "mixtral",
    "qwen2_moe",
    "granitemoe",
    "phimoe",
    "glm4_moe",
    "minimax_m2",
    "ernie4_5_moe",
    "exaone_moe",
    "hy_v3",
    "granitemoeshared",
    "granitemoe_swa",
)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name in TINY])
def test_both_forms_of_files_hold_the_model(name, fused, tmp_path):
    model = tiny_model(name)
    model.save_pretrained(tmp_path / "m", save_original_format=not fused)
    stored = load_file(tmp_path / "m" / "model.safetensors")
    assert any(tensor.ndim == 3 for tensor in stored.values()) == (
        fused or name.startswith("granitemoe")
    )
    source = open_source(tmp_path / "m")
    for index, layer in enumerate(model.model.layers):
        mlp = getattr(layer, "mlp", None) or layer.block_sparse_moe
        if not hasattr(mlp, "experts"):
            continue
        for part in ("gate_up_proj", "down_proj"):
            own = source.load(f"model.layers.{index}.mlp.experts.{part}.weight")
            assert torch.equal(own, getattr(mlp.experts, part))
    assert load(tmp_path / "m").config.family == name


@pytest.mark.parametrize("fused", [False, True])
def test_a_single_expert(fused, tmp_path):
    model = tiny_model("mixtral", num_local_experts=1, num_experts_per_tok=1)
    model.save_pretrained(tmp_path / "m", save_original_format=not fused)
    own = open_source(tmp_path / "m").load("model.layers.1.mlp.experts.down_proj.weight")
    assert torch.equal(own, model.model.layers[1].mlp.experts.down_proj)


def test_transposed_and_interleaved_experts_are_put_in_order(tmp_path):
    model = tiny_model("gpt_oss")
    model.save_pretrained(tmp_path / "m")
    source = open_source(tmp_path / "m")
    for index, layer in enumerate(model.model.layers):
        experts, own = layer.mlp.experts, f"model.layers.{index}.mlp.experts."
        made = torch.cat((experts.gate_up_proj[..., ::2], experts.gate_up_proj[..., 1::2]), dim=2)
        assert torch.equal(source.load(f"{own}gate_up_proj.weight"), made.transpose(1, 2))
        bias = experts.gate_up_proj_bias
        halves = torch.cat((bias[:, ::2], bias[:, 1::2]), dim=1)
        assert torch.equal(source.load(f"{own}gate_up_proj.bias"), halves)
        down = experts.down_proj.transpose(1, 2)
        assert torch.equal(source.load(f"{own}down_proj.weight"), down)
        assert torch.equal(source.load(f"{own}down_proj.bias"), experts.down_proj_bias)


# Of 96, neither tensor is square; of 64, gate and up are; of 128, down is.
@pytest.mark.parametrize("width", [96, 64, 128])
@pytest.mark.parametrize("transposed", [False, True])
def test_shapes_tell_whether_whole_tensors_are_transposed(width, transposed, tmp_path):
    model = tiny_model("qwen3_moe", moe_intermediate_size=width)
    model.save_pretrained(tmp_path / "m", save_original_format=False)

    def turn(tensors):
        for name in [name for name in tensors if ".experts." in name and transposed]:
            tensors[name] = tensors[name].mT.contiguous()

    change(tmp_path / "m", turn)
    source = open_source(tmp_path / "m")
    for part in ("gate_up_proj", "down_proj"):
        own = source.load(f"model.layers.2.mlp.experts.{part}.weight")
        assert torch.equal(own, getattr(model.model.layers[2].mlp.experts, part))


def test_experts_in_several_shards(tmp_path):
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path / "m", max_shard_size="200KB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 3
    source = open_source(tmp_path / "m")
    assert len(source.files) == len(list((tmp_path / "m").glob("*.safetensors")))
    own = source.load("model.layers.1.mlp.experts.gate_up_proj.weight")
    assert torch.equal(own, model.model.layers[1].mlp.experts.gate_up_proj)


@pytest.fixture
def folder(tmp_path):
    return save_tiny(tmp_path / "m", "mixtral")


def change(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


W1 = "model.layers.1.block_sparse_moe.experts.2.w1.weight"


HEAD = "model.layers.1.self_attn.q_layernorm.norms.2.weight"


def test_norms_of_heads_are_read_from_one_tensor_per_head(tmp_path):
    model = tiny_model("stablelm-norms")
    model.save_pretrained(tmp_path / "m")
    source = open_source(tmp_path / "m")
    for index, layer in enumerate(model.model.layers):
        for part in ("q_layernorm", "k_layernorm"):
            norms = getattr(layer.self_attn, part).norms
            own = source.load(f"model.layers.{index}.self_attn.{part}.weight")
            assert torch.equal(own, torch.stack([norm.weight for norm in norms]))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: tensors.pop(HEAD), r"lacks .*norms\.2\.weight \(1 of 4 such tensors"),
        (
            lambda tensors: tensors.update({HEAD: torch.ones(32)}),
            r"norms\.2\.weight is \(32,\) .*norms\.0\.weight is \(64,\)",
        ),
        (
            lambda tensors: tensors.update({HEAD: torch.ones(64, dtype=torch.float16)}),
            r"norms\.2\.weight is .*float16, .*float32: all must be equal",
        ),
        (
            lambda tensors: tensors.update({HEAD.replace("2", "4"): torch.ones(64)}),
            r"holds .*norms\.4\.weight",
        ),
    ],
)
def test_norms_that_do_not_fit_the_heads_are_refused(edit, message, tmp_path):
    folder = save_tiny(tmp_path / "m", "stablelm-norms")
    change(folder, edit)
    with pytest.raises(CheckpointError, match=message):
        open_source(folder)


def test_a_missing_expert_is_named(folder):
    change(folder, lambda tensors: tensors.pop(W1))
    with pytest.raises(CheckpointError, match=rf"lacks {W1} \(1 of 8 such tensors"):
        open_source(folder)


def test_experts_of_different_sizes_or_dtypes_are_refused(folder):
    change(folder, lambda tensors: tensors.update({W1: tensors[W1][:-32]}))
    with pytest.raises(
        CheckpointError, match=rf"{W1} is \(160, 128\).*0\.w1\.weight is \(192, 128\)"
    ):
        open_source(folder)


def test_a_damaged_number_of_experts_is_found_without_listing_all(folder):
    text = (folder / "config.json").read_text()
    text = text.replace('"num_local_experts": 4', '"num_local_experts": 4000000000')
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.0\.mlp\.experts"):
        open_source(folder)


def test_drafting_layers_behind_the_last_one_are_passed_over(tmp_path):
    folder = save_tiny(tmp_path / "m", "glm4_moe")
    change(folder, lambda tensors: tensors.update({"model.layers.3.eh_proj.weight": torch.ones(2)}))
    assert any("model.layers.3.eh_proj" in note for note in open_source(folder).notes)
    change(folder, lambda tensors: tensors.update({"model.layers.4.eh_proj.weight": torch.ones(2)}))
    with pytest.raises(CheckpointError, match=r"model\.layers\.4\.eh_proj"):
        open_source(folder)


DRAFTS = {
    "ernie4_5_moe": "model.mtp_block.0.mlp.up_proj.weight",
    "exaone_moe": "mtp.layers.0.eh_proj.weight",
    "mellum": "mtp.0.norm.weight",
}


@pytest.mark.parametrize("name", DRAFTS)
def test_drafting_parts_are_passed_over(name, tmp_path):
    folder = save_tiny(tmp_path / "m", name)
    change(folder, lambda tensors: tensors.update({DRAFTS[name]: torch.ones(2)}))
    assert any(DRAFTS[name] in note for note in open_source(folder).notes)
    other = f"model.layers.0.{DRAFTS[name]}"
    change(folder, lambda tensors: tensors.update({other: torch.ones(2)}))
    with pytest.raises(CheckpointError, match=re.escape(other)):
        open_source(folder)


def test_a_correction_is_a_vector_or_one_row(tmp_path):
    folder = save_tiny(tmp_path / "m", "ernie4_5_moe")
    own = "model.layers.1.mlp.gate.e_score_correction_bias"
    there = "model.layers.1.mlp.moe_statics.e_score_correction_bias"
    stored = load_file(folder / "model.safetensors")[there]
    assert stored.shape == (1, 6)
    assert torch.equal(open_source(folder).load(own), stored[0])
    change(folder, lambda tensors: tensors.update({there: stored[0]}))
    assert torch.equal(open_source(folder).load(own), stored[0])
    change(folder, lambda tensors: tensors.update({there: stored.expand(2, 6).contiguous()}))
    with pytest.raises(CheckpointError, match=rf"{own}.*\(2, 6\).*\(6,\)"):
        open_source(folder)
