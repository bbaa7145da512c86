"""A factor that one matrix has and the next takes back changes nothing in what is quantized."""

from dataclasses import replace

import pytest
import torch

from quatom.checkpoint.reader import open_source
from quatom.loading import load_float_layer
from quatom.plan import plan
from quatom.presets import PRESETS
from quatom.quantize.pipeline import quantize_checkpoint
from quatom.quantize.transforms.products import balance_products, balancing_power
from quatom.recipe import CalibrationSpec
from tests.checkpoint.models import replace_tensors
from tests.families.models import save_tiny

PAIRS = {
    "attention": ("self_attn.v_proj", "self_attn.o_proj"),
    "mlp": ("mlp.up_proj", "mlp.down_proj"),
}


def scaled(folder, target, pair, factor, layers=2):
    """A copy with the first matrix (and bias) of every block divided and the second multiplied."""
    import shutil

    shutil.copytree(folder, target)
    source = open_source(folder)
    changes = {}
    for layer in range(layers):
        maker, taker = (f"model.layers.{layer}.{name}" for name in PAIRS[pair])
        changes[f"{maker}.weight"] = source.load(f"{maker}.weight") / factor
        changes[f"{taker}.weight"] = source.load(f"{taker}.weight") * factor
        if f"{maker}.bias" in source.names():
            changes[f"{maker}.bias"] = source.load(f"{maker}.bias") / factor
    changes = {name.replace(".", "__"): tensor for name, tensor in changes.items()}
    replace_tensors(target / "model.safetensors", **changes)
    return target


@pytest.mark.parametrize(
    ("model", "pair", "factor"),
    [
        ("tiny_llama_dir", "attention", 2.0**11),
        ("tiny_llama_dir", "mlp", 2.0**-11),
        ("tiny_qwen2_dir", "attention", 2.0**-11),  # with a bias
        ("tiny_qwen2_dir", "mlp", 2.0**11),
    ],
)
def test_the_checkpoint_does_not_depend_on_the_factor(
    model, factor, pair, tmp_path, text_file, request
):
    folder = request.getfixturevalue(model)
    spec = CalibrationSpec(num_samples=2, sequence_length=32)
    recipe = replace(PRESETS["atom-w4a4kv4"], calibration=spec)
    targets = []
    for name, source in (
        ("a", folder),
        ("b", scaled(folder, tmp_path / "scaled", pair, factor)),
    ):
        targets.append(tmp_path / name)
        quantize_checkpoint(source, targets[-1], recipe, calibration=text_file)
    one, other = map(open_source, targets)
    assert one.names() == other.names()
    for name in one.names():
        assert torch.equal(one.load(name), other.load(name)), name


def test_the_block_computes_the_same_function(tiny_llama_dir, tmp_path):
    source = open_source(scaled(tiny_llama_dir, tmp_path / "scaled", "attention", 2.0**20))
    layer = plan(source.model_config, PRESETS["fp16"]).layers[0]
    weights = load_float_layer(source, layer, torch.device("cpu"), torch.float32)
    balanced = balance_products(layer, weights, {})
    first = layer.spec.attention.q_size + layer.spec.attention.kv_size
    head = layer.spec.attention.head_dim
    before, after = ({n: s.weight for n, s in w.sites.items()} for w in (weights, balanced))
    v, o = after["qkv"][first:], after["o"]
    # Powers of two leave every product as it is, and the two are at most a factor of two apart.
    want = before["o"][:, :head] @ before["qkv"][first : first + head]
    assert torch.equal(o[:, :head] @ v[:head], want)
    assert 0.5 <= v.square().mean().sqrt() / o.square().mean().sqrt() <= 2.0
    assert torch.equal(after["qkv"][:first], before["qkv"][:first])


def test_matrices_that_are_zero_stay(tmp_path):
    one, zero = torch.ones(4, 4), torch.zeros(4, 4)
    assert balancing_power(one, zero) == balancing_power(zero, one) == 0
    assert balancing_power(one, one) == 0
    assert balancing_power(one / 1024, one * 1024) == 10
    assert balancing_power(one * 1024, one / 1024) == -10


def test_experts_whose_up_is_clamped_are_left_alone(tmp_path):
    source = open_source(save_tiny(tmp_path / "m", "gpt_oss"))
    layer = plan(source.model_config, PRESETS["w4a16"]).layers[0]
    weights = load_float_layer(source, layer, torch.device("cpu"), torch.float32)
    large = replace(
        weights.sites["experts_down"], weight=weights.sites["experts_down"].weight * 2.0**12
    )
    weights = replace(weights, sites={**weights.sites, "experts_down": large})
    balanced = balance_products(layer, weights, {})
    for site in ("experts_gate_up", "experts_down"):
        assert balanced.sites[site] is weights.sites[site]
