"""FP8 sources: each stored number times its scale, in float32."""

import json

import pytest
import torch
from safetensors.torch import load as parse

from quatom.checkpoint.reader import open_source
from quatom.errors import CheckpointError, ModelError
from quatom.loading import load
from tests.checkpoint.models import CONFIG, write_file, write_model

E4M3 = torch.float8_e4m3fn


def block_scales(weight, rows, columns):
    grid = -(-weight.shape[0] // rows), -(-weight.shape[1] // columns)
    generator = torch.Generator().manual_seed(weight.numel())
    return torch.rand(grid, generator=generator) + 0.5


LAYOUTS = {  # suffix, scale of a weight, quantization_config
    "one": ("_scale", lambda w: torch.tensor(0.37), {"quant_method": "compressed-tensors"}),
    "one in a list": ("_scale", lambda w: torch.tensor([0.37]), {"quant_method": "modelopt"}),
    "rows": ("_scale", lambda w: block_scales(w, 1, 10**6), {"quant_method": "fbgemm_fp8"}),
    "rows in a list": (
        "_scale",
        lambda w: block_scales(w, 1, 10**6)[:, 0].bfloat16(),
        {"quant_method": "compressed-tensors"},
    ),
    "blocks": (  # 160 rows are one block and a quarter
        "_scale_inv",
        lambda w: block_scales(w, 128, 64),
        {"quant_method": "fp8", "weight_block_size": [128, 64]},
    ),
    "blocks, scales of one byte": (
        "_scale_inv",
        lambda w: (2.0 ** block_scales(w, 128, 64).round()).to(torch.float8_e8m0fnu),
        {"quant_method": "fp8", "weight_block_size": [128, 64]},
    ),
    "blocks of compressed-tensors": (
        "_scale",
        lambda w: block_scales(w, 128, 64),
        {
            "quant_method": "compressed-tensors",
            "config_groups": {"group_0": {"weights": {"block_structure": [128, 64]}}},
        },
    ),
}


def write_fp8(folder, layout, **config):
    """Returns what reading must give, computed entry by entry in float64."""
    suffix, scale_of, quantization = LAYOUTS[layout]
    write_model(folder, CONFIG | {"head_dim": 64, "quantization_config": quantization | config})
    file = folder / "model.safetensors"
    stored, expected = {}, {}
    for name, tensor in parse(file.read_bytes()).items():
        if "proj" not in name:
            stored[name] = expected[name] = tensor.bfloat16()
            continue
        scale = scale_of(tensor)
        stored[name], stored[name + suffix] = tensor.to(E4M3), scale
        stored[name.replace("weight", "input_scale")] = torch.tensor(1.0)
        full = scale.float().double().reshape(scale.shape if scale.dim() == 2 else (-1, 1))
        rows = 1 if full.shape[0] > 1 else 10**6
        block = [128, 64] if layout.startswith("blocks") else [rows, 10**6]
        i = torch.arange(tensor.shape[0]) // block[0]
        j = torch.arange(tensor.shape[1]) // block[1]
        expected[name] = stored[name].double() * full[i][:, j]
    write_file(file, stored)
    return expected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_dequantized_when_they_are_read(layout, tmp_path):
    expected = write_fp8(tmp_path, layout)
    source = open_source(tmp_path)
    assert source.recipe is None
    for name, tensor in expected.items():
        got = source.load(name, source.shape(name))
        assert got.dtype == source.dtype(name)
        # One product, rounded to float32 once.
        assert torch.allclose(got.double(), tensor.double(), rtol=2**-24, atol=0), name
    assert source.notes == (
        "14 weights are in FP8 (e4m3): dequantized to float32 when they are read",
        "14 scales of activations or KV caches passed over",
    )
    assert load(tmp_path).recipe.name == "fp16"


def damage(folder, **changes):
    file = folder / "model.safetensors"
    tensors = parse(file.read_bytes()) | {k.replace("__", "."): v for k, v in changes.items()}
    write_file(file, {name: t for name, t in tensors.items() if t is not None})


UP = "model__layers__0__mlp__up_proj__weight"


def test_scales_that_are_missing_or_fit_no_layout(tmp_path):
    write_fp8(tmp_path, "blocks")
    damage(tmp_path, **{f"{UP}_scale_inv": torch.ones(3, 2)})
    with pytest.raises(CheckpointError, match=r"up_proj.weight \(160, 128\) has shape \(3, 2\)"):
        open_source(tmp_path)
    damage(tmp_path, **{f"{UP}_scale_inv": None})
    with pytest.raises(CheckpointError, match=r"up_proj.weight is in FP8 and has no .*_scale_inv"):
        open_source(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for block in (None, [128], "128", [0, 64], [128, 64.0]):
        write_fp8(tmp_path, "blocks", weight_block_size=block)
        with pytest.raises(CheckpointError, match="nor one per block of the size"):
            open_source(tmp_path)
    assert config["quantization_config"]["weight_block_size"] == [128, 64]


def test_other_formats_of_the_same_methods_are_refused(tmp_path):
    quantization = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    write_model(tmp_path, CONFIG | {"quantization_config": quantization})
    with pytest.raises(ModelError, match=r"'compressed-tensors' with weights in another format"):
        open_source(tmp_path)


def test_fp4_is_named_and_not_taken_for_fp8(tmp_path):
    quantization = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    write_model(tmp_path, CONFIG | {"quantization_config": quantization})
    packed = {UP: torch.zeros(160, 64, dtype=torch.uint8), f"{UP}_scale": torch.ones(160, 8)}
    damage(
        tmp_path, **{name: t.to(E4M3) if t.is_floating_point() else t for name, t in packed.items()}
    )
    with pytest.raises(ModelError, match=r"up_proj.weight_scale is in FP8 and is no weight: .*FP4"):
        open_source(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_not_finite_are_refused(value, tmp_path):
    write_fp8(tmp_path, "one")
    damage(tmp_path, **{f"{UP}_scale": torch.tensor(value)})
    source = open_source(tmp_path)
    with pytest.raises(CheckpointError, match=r"up_proj.weight holds"):
        source.load(UP.replace("__", "."))
