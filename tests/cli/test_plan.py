"""`quatom plan`: its numbers are those of a model that is really made."""

import json
from pathlib import Path

import pytest

from quatom.benchmark.memory_plan import GIB, GPUS, plan_memory
from quatom.benchmark.model_shapes import find_shape
from quatom.benchmark.random_weights import random_model
from quatom.presets import PRESETS
from quatom.recipe_file import changed
from tests.checkpoint.gguf_models import write_gguf

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


MIXED = {"overrides": [{"layers": "1", "kv_cache": {"format": "int8"}}]}


@pytest.mark.parametrize("recipe", ["fp16", "quatom-w4a8kv4", "w8a8", "mixed"])
def test_kv_bytes_are_those_of_the_cache(recipe):
    chosen = PRESETS.get(recipe) or changed(PRESETS["quatom-w4a8kv4"], MIXED)
    loaded = random_model("tiny", chosen, device="cpu")
    layers = loaded.model.allocate_kv_cache(1, 32)
    made = sum(layer.bytes_per_block for layer in layers) // 32
    if recipe == "fp16" or recipe == "w8a8":
        made //= 2  # a float cache has the dtype of the activations, float32 on a CPU
    found = plan_memory(find_shape("tiny"), chosen, 1.0)
    assert found.kv_bytes_per_token == made


def test_weight_bytes_are_those_of_the_checkpoint(small_checkpoint):
    from quatom.checkpoint.reader import read_model_config

    config, recipe = read_model_config(small_checkpoint)
    stored = sum(f.stat().st_size for f in small_checkpoint.glob("*.safetensors"))
    # The files have float32 embeddings and norms where the plan counts two bytes, and headers.
    embedding = config.vocab_size * config.hidden_size
    found = plan_memory(config, recipe, 1.0).weight_bytes
    assert found == pytest.approx(stored - 2 * 2 * embedding, rel=0.1)


def test_what_fits():
    found = plan_memory(find_shape("llama-2-70b"), PRESETS["fp16"], GPUS["H100"].memory_gib)
    assert not found.fits
    assert found.kv_tokens == found.sequences(4096) == 0
    found = plan_memory(find_shape("llama-2-70b"), PRESETS["quatom-w4a8kv4"], 79.2)
    assert found.fits
    free = found.budget_bytes - found.weight_bytes
    assert found.kv_tokens == free // found.kv_bytes_per_token > 400_000
    assert found.budget_bytes == int(0.9 * 79.2 * GIB)


def test_a_gpu_is_called_tested_if_there_are_results_of_it():
    machines = {
        name
        for file in RESULTS.glob("*.json")
        for name in GPUS
        if name in json.loads(file.read_text())["environment"].get("gpu", "")
    }
    assert {name for name, gpu in GPUS.items() if gpu.tested} == machines


def test_the_command(shell, small_dir, small_checkpoint):
    done = shell("plan", small_dir, "--gpu", "h100", "--gpu", "RTX4090")
    assert done.status == 0, done
    assert "fp16" in done.out
    assert "quatom-w4a8kv4" in done.out
    assert "RTX4090 (not tested)" in done.out
    out = shell("plan", small_checkpoint, "--gpu-memory", 8).out
    assert "atom-w4a4kv4" in out
    assert "fp16" not in out
    assert "does not fit" in shell("plan", "random:llama-2-70b", "--gpu", "L4").out
    assert "unknown GPU 'H300'" in shell.fails("plan", small_dir, "--gpu", "H300")


def test_it_needs_no_weights(shell, small_dir, tmp_path):
    (tmp_path / "config.json").write_bytes((small_dir / "config.json").read_bytes())
    assert shell("plan", tmp_path, "--gpu", "H100").status == 0
    write_gguf(tmp_path / "model.gguf")
    done = shell("plan", tmp_path / "model.gguf", "--gpu", "H100")
    assert done.status == 0, done
    assert "does not exist" in shell.fails("plan", tmp_path / "none")
