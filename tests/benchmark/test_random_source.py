"""Random weights as a source of `quatom quantize`."""

import json
from dataclasses import replace

import pytest
import torch

from quatom.benchmark.model_shapes import SHAPES, find_shape
from quatom.benchmark.random_source import random_source, random_tokens
from quatom.checkpoint.reader import open_source
from quatom.errors import ModelError
from quatom.presets import PRESETS
from quatom.quantize.pipeline import quantize_checkpoint
from quatom.recipe import CalibrationSpec


def test_every_shape_is_described_by_a_config_and_has_the_tensors_of_one():
    for name in SHAPES:
        source, config = random_source(name), find_shape(name)
        assert source.model_config == config
        assert source.shape("lm_head.weight") == (config.vocab_size, config.hidden_size)
        assert source.dtype("model.norm.weight") is torch.bfloat16


def test_weights_repeat_and_differ_from_each_other():
    names = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)]
    first, second = (random_source("tiny").load(name) for name in names)
    assert torch.equal(first, random_source("tiny").load(names[0]))
    assert not torch.equal(first, second)
    assert not torch.equal(first, random_source("tiny", seed=1).load(names[0]))
    # 65536 draws: the standard deviation is known to about 0.3 %.
    assert first.float().std() == pytest.approx(0.02, rel=0.02)
    assert random_source("tiny").load("model.norm.weight").eq(1).all()


def test_an_unknown_shape_is_named():
    with pytest.raises(ModelError, match="llama-9"):
        random_source("llama-9")


def test_a_checkpoint_comes_of_it(tmp_path):
    source = random_source("tiny")
    spec = CalibrationSpec(num_samples=2, sequence_length=32)
    tokens = random_tokens(source.model_config, spec)
    assert tokens.shape == (2, 32)
    recipe = replace(PRESETS["atom-w4a4kv4"], calibration=spec)
    quantize_checkpoint(source, tmp_path / "q", recipe, calibration=tokens)
    written = open_source(tmp_path / "q")
    assert written.model_config == source.model_config
    assert json.loads((tmp_path / "q" / "quatom_report.json").read_text())["blocks"]
