"""A folder becomes a model: dtypes, devices, backends, tokenizers; damage is refused."""

import shutil
from dataclasses import replace

import pytest
import torch

from quatom.checkpoint.reader import open_source
from quatom.errors import BackendError, CheckpointError, RecipeError, ShapeError
from quatom.loading import load
from quatom.modeling.linear import FloatLinear, QuantizedLinear
from quatom.ops.backend import Backend
from quatom.placement import default_dtype, usable_device, usable_dtype
from quatom.presets import PRESETS
from quatom.quantize.pipeline import quantize_checkpoint
from tests.checkpoint.models import CONFIG, write_model
from tests.conftest import write_byte_tokenizer
from tests.families.models import save_tiny

SMALL = CONFIG | {"vocab_size": 260, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture(scope="module")
def source_dir(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("m") / "bf16", SMALL, dtype=torch.bfloat16)
    write_byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint_dir(source_dir, tmp_path_factory):
    target = tmp_path_factory.mktemp("q") / "w8a8"
    quantize_checkpoint(source_dir, target, "w8a8")
    return target


def linears(loaded):
    block = loaded.model.blocks[0]
    return list(block.linears.values())


def test_a_floating_point_folder(source_dir):
    loaded = load(source_dir)
    assert loaded.recipe == PRESETS["fp16"]
    assert (loaded.dtype, loaded.source_dtype) == (torch.float32, torch.bfloat16)
    assert loaded.backend_name == "torch"
    assert loaded.source == str(source_dir)
    assert all(isinstance(linear, FloatLinear) for linear in linears(loaded))
    assert loaded.require_tokenizer().decode([39]) != ""


def test_a_checkpoint(checkpoint_dir):
    loaded = load(checkpoint_dir)
    assert loaded.recipe == PRESETS["w8a8"]
    assert loaded.source_dtype == torch.bfloat16  # what is not quantized keeps its dtype
    assert loaded.backend_name in ("cpu", "reference")
    assert all(isinstance(linear, QuantizedLinear) for linear in linears(loaded))
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_asked_for(dtype, source_dir, checkpoint_dir):
    for folder in (source_dir, checkpoint_dir):
        loaded = load(folder, dtype=dtype)
        assert loaded.dtype == loaded.model.embedding.dtype == dtype
        assert loaded.model.allocate_kv_cache(1, 16)[0].dtype == str(dtype).removeprefix("torch.")


def test_the_dtype_by_default(source_dir):
    source = open_source(source_dir)
    assert default_dtype(source, torch.device("cpu")) == torch.float32
    assert default_dtype(source, torch.device("cuda")) == torch.bfloat16


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert usable_device("cpu") == torch.device("cpu")
    with pytest.raises(BackendError, match="no GPU: use cpu"):
        usable_device("cuda")
    with pytest.raises(BackendError, match="'meta' is not supported: use cpu or cuda"):
        usable_device("meta")
    with pytest.raises(BackendError, match="unknown device 'gpu9'"):
        usable_device("gpu9")
    with pytest.raises(BackendError, match=r"unknown device 3\.5"):
        usable_device(3.5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert usable_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(BackendError, match="'cuda:2' was asked for but torch sees 2"):
        usable_device("cuda:2")


def test_a_number_format_goes_by_its_name_too(source_dir):
    assert load(source_dir, dtype="bfloat16").dtype == torch.bfloat16
    assert usable_dtype(None) is None
    for wrong in ("half", "int8", torch.int8, torch.float64, 16):
        with pytest.raises(BackendError, match="dtype must be one of float32, bfloat16, float16"):
            load(source_dir, dtype=wrong)


def test_what_is_no_model_or_no_backend_is_refused_before_anything_is_read(source_dir):
    assert load(source_dir, backend="reference").dtype == torch.float32
    with pytest.raises(BackendError, match=r"backend must be one of reference, .*got 'cutlass'"):
        load(source_dir, backend="cutlass")
    with pytest.raises(CheckpointError, match=r"a model is a folder, .*got None"):
        load(None)


def test_a_folder_without_tokenizer_runs_on_token_ids(source_dir, tmp_path):
    folder = shutil.copytree(source_dir, tmp_path / "m")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    loaded = load(folder)
    assert loaded.tokenizer is None
    with pytest.raises(CheckpointError, match="has no tokenizer files"):
        loaded.require_tokenizer()


def test_weights_of_a_checkpoint_are_those_of_its_source_up_to_half_a_step(
    source_dir, checkpoint_dir
):
    """w8a8 keeps the order of channels and rows: every linear can be compared as it is."""
    quantized = linears(load(checkpoint_dir, backend=Backend.REFERENCE))
    for ours, theirs in zip(quantized, linears(load(source_dir)), strict=True):
        (weight,) = ours.prepared.tensors
        step = theirs.weight.abs().amax(dim=1, keepdim=True) / 127
        # Half a step, and 127 times the rounding of the scale to float16.
        assert ((weight - theirs.weight).abs() <= step * (0.5 + 127 * 2.0**-11)).all()


def test_another_backend_is_refused_where_it_cannot_run(checkpoint_dir):
    from quatom.ops.backend import Backend

    with pytest.raises(BackendError, match="cuda"):
        load(checkpoint_dir, backend=Backend.CUDA)


def test_a_loaded_model_is_a_value(source_dir):
    loaded = load(source_dir)
    assert replace(loaded, source="x").model is loaded.model


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (
            {"recipe": None},
            RecipeError,
            "recipe must be a Recipe or the name of a preset, got None",
        ),
        ({"dtype": "int4"}, BackendError, "dtype must be one of"),
        ({"backend": "cutlass"}, BackendError, "backend must be one of"),
    ],
)
def test_quantizing_refuses_the_same_before_anything_is_written(
    wrong, error, message, source_dir, tmp_path
):
    with pytest.raises(error, match=message):
        quantize_checkpoint(source_dir, tmp_path / "q", **{"recipe": "w8a8", **wrong})
    assert not list(tmp_path.iterdir())


def test_a_model_that_could_not_run_is_not_quantized(tmp_path):
    folder = save_tiny(tmp_path / "m", "qwen3", head_dim=32)
    with pytest.raises(ShapeError, match="head_dim 32 is not supported; the paged cache has 64"):
        quantize_checkpoint(folder, tmp_path / "q", "w8a8")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
