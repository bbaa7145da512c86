"""MXFP4 sources: the numbers are those that transformers dequantizes, in bfloat16."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from quatom.checkpoint.mxfp4 import dequantize_mxfp4
from quatom.checkpoint.reader import open_source
from quatom.errors import CheckpointError, ModelError
from quatom.loading import load
from quatom.modeling.context import full_sequences_context
from tests.families.models import save_mxfp4

BLOCKS = "model.layers.1.mlp.experts.down_proj_blocks"
SCALES = "model.layers.1.mlp.experts.down_proj_scales"


@pytest.fixture
def folder(tmp_path):
    save_mxfp4(tmp_path / "m")
    return tmp_path / "m"


def change(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def configure(folder, **quantization):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= quantization
    (folder / "config.json").write_text(json.dumps(config))


def test_every_code_under_every_scale():
    codes = torch.arange(256, dtype=torch.uint8)
    blocks = codes.view(1, 16, 16).expand(255, 16, 16)
    scales = torch.arange(255, dtype=torch.uint8)[:, None].expand(255, 16)
    got = dequantize_mxfp4(blocks, scales)
    values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    values += [-value for value in values]
    for exponent in (0, 1, 60, 127, 250, 254):
        for byte in (0, 7, 0x1F, 0xA3, 255):
            for half, code in enumerate((byte % 16, byte // 16)):
                want = values[code] * 2.0 ** (exponent - 127)
                want = want if abs(want) < 2.0**128 else math.copysign(math.inf, want)
                assert got[exponent, 2 * byte + half] == want
    finite = got[torch.isfinite(got)]
    assert torch.equal(finite.bfloat16().float(), finite)  # bfloat16 holds all of them


@torch.inference_mode()
def test_the_file_holds_the_model_that_transformers_dequantizes(tmp_path):
    model = save_mxfp4(tmp_path / "m")
    source = open_source(tmp_path / "m")
    assert source.recipe is None
    assert "4 weights are in MXFP4: dequantized to bfloat16 when they are read" in source.notes
    for index, layer in enumerate(model.model.layers):
        experts, own = layer.mlp.experts, f"model.layers.{index}.mlp.experts."
        for part in ("gate_up_proj", "down_proj"):
            weight = getattr(experts, part).transpose(1, 2)
            bias = getattr(experts, f"{part}_bias")
            if part == "gate_up_proj":
                weight, bias = (torch.cat((x[:, ::2], x[:, 1::2]), dim=1) for x in (weight, bias))
            assert source.dtype(f"{own}{part}.weight") == torch.bfloat16
            assert torch.equal(source.load(f"{own}{part}.weight").float(), weight)
            assert torch.equal(source.load(f"{own}{part}.bias"), bias)
    loaded = load(tmp_path / "m")
    tokens = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(1))
    context = full_sequences_context(1, 40, 16, loaded.device)
    cache = loaded.model.allocate_kv_cache(3, 16)
    got = loaded.model.compute_logits(loaded.model(tokens, context, cache))
    assert (got - model(tokens[None]).logits[0]).abs().max() < 1e-3  # see test_logits.py


def test_one_expert_is_dequantized_at_a_time(folder, monkeypatch):
    from quatom.checkpoint import mxfp4

    sizes = []

    def watched(codes, exponents):
        sizes.append(codes.shape)
        return dequantize_mxfp4(codes, exponents)

    monkeypatch.setattr(mxfp4, "dequantize_mxfp4", watched)
    open_source(folder).load("model.layers.1.mlp.experts.down_proj.weight")
    assert sizes == [(160, 3, 16)] * 6


def test_keys_that_are_not_known_are_refused(folder):
    configure(folder, modules_to_not_convert=None, dequantize=True)
    open_source(folder)
    configure(folder, block_size=16)
    with pytest.raises(ModelError, match="method mxfp4 has block_size, which may change"):
        open_source(folder)


def test_scales_that_are_missing_are_named(folder):
    change(folder, lambda tensors: tensors.pop(SCALES))
    with pytest.raises(CheckpointError, match=f"lacks {SCALES}, the scales of {BLOCKS}"):
        open_source(folder)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda t: {SCALES: t[SCALES][:, :-1].clone()},
        lambda t: {BLOCKS: t[BLOCKS][..., :8].contiguous()},
        lambda t: {SCALES: t[SCALES].float()},
        lambda t: {BLOCKS: t[BLOCKS].flatten(), SCALES: t[SCALES].flatten()},
    ],
)
def test_codes_and_scales_that_do_not_fit_are_refused(folder, spoil):
    change(folder, lambda tensors: tensors.update(spoil(tensors)))
    with pytest.raises(CheckpointError, match=f"{BLOCKS} .* do not fit: codes are"):
        open_source(folder)


def test_a_whole_tensor_of_another_size_is_refused(folder):
    change(
        folder,
        lambda t: t.update({BLOCKS: t[BLOCKS][:, :32].clone(), SCALES: t[SCALES][:, :32].clone()}),
    )
    with pytest.raises(CheckpointError, match=r"down_proj.weight has shape \(6, 32, 96\)"):
        open_source(folder)


def test_a_scale_without_a_value_is_found_when_it_is_read(folder):
    change(folder, lambda tensors: tensors[SCALES].fill_(255))
    source = open_source(folder)
    with pytest.raises(CheckpointError, match=r"down_proj.weight holds .* NaN or infinite"):
        source.load("model.layers.1.mlp.experts.down_proj.weight")


def test_a_configuration_of_another_file_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"down_proj.*|gate_up_proj.*"):
        open_source(folder)
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config))
    weight = torch.zeros(6, 96, 160)

    def as_floats(tensors):
        for name in [n for n in tensors if n.endswith(("_blocks", "_scales"))]:
            del tensors[name]
            tensors[name.rpartition("_")[0]] = weight.clone()

    change(folder, as_floats)
    with pytest.raises(ModelError, match="says mxfp4, and no tensor is in MXFP4"):
        open_source(folder)


def test_shapes_are_known_from_headers(folder):
    source = open_source(folder)
    assert source.shape("model.layers.0.mlp.experts.gate_up_proj.weight") == (6, 192, 160)
