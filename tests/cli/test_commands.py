"""Each command on a small model: what it prints and writes."""

import json

import pytest
import torch

from quatom.checkpoint.schema import bits_per_weight
from quatom.families.registry import read_config
from quatom.loading import load
from quatom.plan import plan
from quatom.presets import PRESETS
from quatom.recipe import Recipe
from tests.cli.commands import SMALL

SHORT = ("--num-samples", 2, "--sequence-length", 24)


def test_quantize_writes_a_checkpoint_and_its_bits(small_dir, text_file, shell, tmp_path):
    done = shell(
        "quantize", small_dir, tmp_path / "q", "--recipe", "atom-w4a8kv4",
        *("--calibration", text_file, "--seed", 3), *SHORT,
    )  # fmt: skip
    assert (done.status, done.err) == (0, "")
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    recipe = Recipe.from_dict(config["quantization_config"]["recipe"])
    assert recipe.name == "atom-w4a8kv4"
    assert (recipe.calibration.num_samples, recipe.calibration.sequence_length) == (2, 24)
    assert recipe.calibration.seed == 3
    assert f"{bits_per_weight(plan(read_config(SMALL), recipe)):.3f}" in done.out
    assert load(tmp_path / "q").recipe == recipe


def test_quantize_takes_a_recipe_file(small_dir, shell, tmp_path):
    recipe = Recipe(
        name="mine",
        weights=PRESETS["w8a8"].weights,
        activations=PRESETS["w8a8"].activations,
        kv_cache=PRESETS["w8a8"].kv_cache,
        outliers=PRESETS["w8a8"].outliers,
    )
    (tmp_path / "mine.json").write_text(json.dumps(recipe.to_dict()))
    done = shell("quantize", small_dir, tmp_path / "q", "--recipe", tmp_path / "mine.json")
    assert done.status == 0, done.err
    assert load(tmp_path / "q").recipe == recipe


def test_eval_compares_predictions_with_a_reference(
    small_dir, small_checkpoint, text_file, shell, tmp_path
):
    out = tmp_path / "accuracy.json"
    options = ("--sequence-length", 32, "--max-windows", 2, "--json", out)
    done = shell(
        "eval", small_checkpoint, "--perplexity", text_file, "--reference", small_dir, *options
    )
    assert done.status == 0, done
    (entry,) = json.loads(out.read_text())["results"]
    assert 0 < entry["same_top1"] < 1
    assert entry["kl_to_float"] > 0
    shown = f"{entry['kl_to_float']:.4f} ± {entry['kl_to_float_standard_error']:.4f}"
    assert shown in done.out


def test_eval_prints_and_adds_to_a_result_file(
    small_dir, small_checkpoint, text_file, shell, tmp_path
):
    out = tmp_path / "results" / "accuracy.json"
    arguments = ("--perplexity", text_file, "--sequence-length", 64, "--max-windows", 3)
    for folder in (small_checkpoint, small_dir):
        done = shell("eval", folder, *arguments, "--json", out, "--name", "small")
        assert done.status == 0, done.err
    packed, plain = json.loads(out.read_text())["results"]
    assert (packed["recipe"], plain["recipe"]) == ("atom-w4a4kv4", "fp16")
    assert packed["windows"] == plain["windows"] == 3
    assert packed["all_windows"] is False
    assert packed["float_perplexity"] == plain["perplexity"]
    # Both recipes of the file side by side, the floating-point model first with its own bits.
    first, second = (line for line in done.out.splitlines() if "4.50" in line or "32.00" in line)
    assert first.split("\u2502")[1].strip() == "float"
    assert f"{plain['perplexity']:.3f}" in first
    assert f"{packed['perplexity']:.3f}" in second
    assert "--max-windows 3" in packed["command"]


def test_generate_streams_prompt_and_completion(small_checkpoint, shell):
    arguments = ("generate", small_checkpoint, "--prompt", "Once", "--max-tokens", 6)
    greedy = shell(*arguments)
    assert greedy.status == 0, greedy.err
    assert greedy.out.startswith("Once")
    assert shell(*arguments).out == greedy.out
    warm = [shell(*arguments, "--temperature", 2.0, "--seed", seed).out for seed in (1, 1, 2)]
    assert warm[0] == warm[1] != warm[2]


def test_generate_with_the_chat_template(small_checkpoint, shell):
    done = shell("generate", small_checkpoint, "--prompt", "Hi", "--chat", "--max-tokens", 4)
    assert done.status == 0, done.err
    assert not done.out.startswith("Hi")


@pytest.mark.parametrize("layer", [(), ("--layer", 1)])
def test_inspect_a_checkpoint(layer, small_checkpoint, shell, tmp_path):
    out = tmp_path / "q.json"
    done = shell("inspect", small_checkpoint, *layer, "--json", out)
    assert done.status == 0, done.err
    found = json.loads(out.read_text())
    recipe = Recipe.from_dict(found["recipe"])
    assert found["bits_per_weight"] == bits_per_weight(plan(read_config(SMALL), recipe))
    assert found["checkpoint_bytes"] == sum(found["files"].values())
    assert found["checkpoint_bytes"] == sum(
        file.stat().st_size for file in small_checkpoint.glob("*.safetensors")
    )
    assert len(found["layer_bits_per_weight"]) == 2 * 7
    assert f"model.layers.{layer[1] if layer else 0}" in done.out
    assert "down_proj" in done.out


def test_inspect_a_float_model_draws_its_outliers(small_dir, text_file, shell, tmp_path):
    plot, out = tmp_path / "p.png", tmp_path / "o.json"
    done = shell("inspect", small_dir, "--text", text_file, "--plot", plot, "--json", out)
    assert done.status == 0, done.err
    assert plot.read_bytes().startswith(b"\x89PNG")
    sites = json.loads(out.read_text())["sites"]
    assert list(sites) == ["qkv", "o", "gate_up", "down"]
    for site in sites.values():
        moments = torch.tensor(site["second_moment"])[site["order"]]
        assert (moments.diff() >= 0).all()
    assert "median channel's" in done.out
