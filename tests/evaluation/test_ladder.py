"""Ladders: what a rung measures, what rungs share, and running some of them."""

import json
from dataclasses import replace

import pytest
import torch

from quatom.checkpoint.reader import open_source
from quatom.evaluation.ladder import LadderRun
from quatom.evaluation.ladders import LADDERS
from quatom.evaluation.perplexity import measure_perplexity
from quatom.loading import load
from quatom.presets import PRESETS
from quatom.quantize.pipeline import quantize_checkpoint
from quatom.recipe import CalibrationSpec
from tests.checkpoint.models import write_model
from tests.cli.commands import SMALL, Shell
from tests.conftest import write_byte_tokenizer


@pytest.fixture(scope="module")
def source_dir(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("ladder") / "small", SMALL)
    write_byte_tokenizer(folder)
    return folder


def tokens(seed: int, count: int) -> torch.Tensor:
    return torch.randint(0, 260, (count, 32), generator=torch.Generator().manual_seed(seed))


def ladder_run(source_dir, tmp_path, **options) -> LadderRun:
    return LadderRun(
        open_source(source_dir),
        tokens(0, 4),
        tokens(1, 2),
        device=torch.device("cpu"),
        dtype=torch.float32,
        scores_file=tmp_path / "scores",
        **options,
    )


def test_the_presets_are_rungs():
    def parts(recipe):
        return {k: v for k, v in recipe.to_dict().items() if k not in ("name", "calibration")}

    assert parts(LADDERS["atom"]["kv4"]) == parts(PRESETS["atom-w4a4kv4"])
    assert parts(LADDERS["quatom"]["atom"]) == parts(PRESETS["atom-w4a4kv4"])
    assert parts(LADDERS["quatom"]["coordinate_descent"]) == parts(PRESETS["quatom-w4a4kv4"])
    prior_work = ("gptq", "awq", "quip", "smoothquant", "omniquant", "qllm", "rtn")
    for name in (name for name in PRESETS if name.startswith(prior_work)):
        assert LADDERS["prior-work"][name.replace("-", "_")] == PRESETS[name]
    multiples = LADDERS["activations"]["int8_scale_a_token_multiples"]
    assert parts(multiples) == parts(PRESETS["quatom-w4a8kv4"])


@pytest.mark.parametrize("preset", ["fp16", "quatom-w4a4kv4"])
def test_a_rung_is_the_perplexity_of_the_checkpoint(source_dir, tmp_path, preset):
    recipe = None
    model = source_dir
    if preset != "fp16":
        spec = CalibrationSpec(num_samples=4, sequence_length=32)
        recipe = replace(PRESETS[preset], calibration=spec)
        model = tmp_path / "q"
        quantize_checkpoint(source_dir, model, recipe, calibration=tokens(0, 4))
    rung = ladder_run(source_dir, tmp_path).measure("some", recipe)
    whole = measure_perplexity(load(model), tokens(1, 2).flatten(), sequence_length=32)
    # The same operations; a window runs with another beside it, which changes no result.
    assert rung.perplexity == pytest.approx(whole.perplexity, rel=1e-5)


def test_a_rung_of_keys_leaves_the_weights_as_they_are(source_dir, tmp_path):
    run = ladder_run(source_dir, tmp_path)
    floating = run.measure("float", None).perplexity
    for name, recipe in LADDERS["keys"].items():
        exact = replace(recipe, kv_cache=replace(recipe.kv_cache, format="float16"))
        # The same network, its keys offset, scaled and rotated in float32.
        assert run.measure(name, exact).perplexity == pytest.approx(floating, rel=1e-4)
        assert run.measure(name, recipe).perplexity != pytest.approx(floating, rel=1e-4)


def test_scores_are_measured_once_and_kept_for_a_resumed_run(source_dir, tmp_path):
    recipe = LADDERS["atom"]["groups"]
    first = ladder_run(source_dir, tmp_path).measure("groups", recipe)
    (kept,) = tmp_path.glob("scores*")
    assert kept.suffix == ".safetensors"
    run = ladder_run(source_dir, tmp_path)
    run._quantizer = None  # would measure them again
    assert len(run._shared_statistics(recipe)) == 2
    assert ladder_run(source_dir, tmp_path).measure("groups", recipe) == first


def test_some_rungs_now_and_the_rest_later(source_dir, tmp_path, text_file, monkeypatch, capsys):
    shell = Shell(monkeypatch, capsys)
    out = tmp_path / "ablation.json"

    def ablate(*more):
        return shell(
            *("ablate", source_dir, "--calibration", text_file, "--perplexity", text_file),
            *("--json", out, "--sequence-length", 32, "--max-windows", 2, "--num-samples", 2),
            *("--calibration-length", 32, "--ladder", "atom", *more),
        )

    done = ablate("--rungs", "groups,float")
    assert done.status == 0, done.err
    before = {e["rung"]: e["perplexity"] for e in json.loads(out.read_text())["results"]}
    assert before.keys() == {"groups", "float"}
    (row,) = (line for line in done.out.splitlines() if "groups" in line)
    assert "int4 / int4 / 16" in row
    assert f"{before['groups'] - before['float']:+.2f}" in row
    assert list(tmp_path.glob(".ablation-*.safetensors"))
    assert ablate().status == 0
    after = {e["rung"]: e["perplexity"] for e in json.loads(out.read_text())["results"]}
    assert after.keys() == {"float", *LADDERS["atom"]}
    assert before.items() <= after.items()
    assert not list(tmp_path.glob(".ablation-*"))
    wrong = ablate("--rungs", "gruops")
    assert wrong.status == 1
    assert "no rung 'gruops'" in wrong.err
