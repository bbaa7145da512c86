"""Decoding beside transformers: the command runs on a checkpoint as it is written."""

import json
from dataclasses import replace

from quatom.benchmark.cpu_decode import main
from quatom.presets import PRESETS
from quatom.quantize.pipeline import quantize_checkpoint
from quatom.recipe import CalibrationSpec


def test_a_checkpoint_is_measured_beside_the_float_model(tiny_llama_dir, text_file, tmp_path):
    calibration = CalibrationSpec(num_samples=2, sequence_length=32)
    recipe = replace(PRESETS["atom-w4a4kv4"], calibration=calibration)
    quantize_checkpoint(tiny_llama_dir, tmp_path / "q", recipe, calibration=text_file)
    output = tmp_path / "decode.json"
    sizes = ["--batches", "2", "--new-tokens", "3", "--prompt-tokens", "4", "--rounds", "1"]
    main([str(tmp_path / "q"), *sizes, "--output", str(output)])
    (result,) = json.loads(output.read_text())["results"]
    assert result["mode"] == "cpu_decode"
    assert result["batch"] == 2
    assert result["tokens_per_s"] > 0 < result["transformers_tokens_per_s"]
