"""Blocks are streamed: a model of four times as many blocks needs no more memory."""

import json

import pytest

from quatom.families.registry import read_config
from quatom.plan import plan
from quatom.presets import PRESETS
from tests.checkpoint.models import CONFIG, random_tensor, write_file
from tests.checkpoint.rss import peak_rss_bytes
from tests.conftest import write_byte_tokenizer

WIDE = CONFIG | {
    "vocab_size": 260,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
}
BLOCK_BYTES = (4 * 768 * 768 + 3 * 768 * 2048) * 4
"""One block in float32: 28 MB."""

# Orders, clipping, calibration streams and packing, but rounding to nearest: GPTQ holds nothing
# from one block to the next, and would take minutes here.
QUANTIZE = """
import sys
from dataclasses import replace
from quatom.quantize.pipeline import quantize_checkpoint
from quatom.presets import PRESETS
from quatom.recipe import CalibrationSpec, NearestSpec

recipe = PRESETS["atom-w4a4kv4"]
recipe = replace(
    recipe,
    weights=replace(recipe.weights, rounder=NearestSpec()),
    calibration=CalibrationSpec(num_samples=2, sequence_length=16),
)
source, target, text = sys.argv[1:]
quantize_checkpoint(source, target, recipe, calibration=text)
"""


def write_equal_blocks(folder, layers: int):
    """Every block has the same weights, one shard a block; written a block at a time."""
    import torch

    from quatom.checkpoint.schema import checkpoint_tensors

    config = WIDE | {"num_hidden_layers": layers}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    write_byte_tokenizer(folder)
    specs = checkpoint_tensors(plan(read_config(config), PRESETS["fp16"]))
    weight_map = {}
    first = {}
    for layer in [*range(layers), None]:
        prefix = f"model.layers.{layer}."
        tensors = {}
        for name, spec in specs.items():
            if not (name.startswith(prefix) if layer is not None else "layers" not in name):
                continue
            key = name.replace(prefix, "model.layers.0.")
            if key not in first:
                first[key] = random_tensor(key, spec, torch.bfloat16)
            tensors[name] = first[key]
        file = folder / f"model-{len(weight_map):05d}.safetensors"
        write_file(file, tensors)
        weight_map |= dict.fromkeys(tensors, file.name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def peaks(tmp_path_factory, text_file):
    folder = tmp_path_factory.mktemp("memory")
    least = {}
    for layers in (4, 16):
        source = write_equal_blocks(folder / f"source-{layers}", layers)
        # Which freed pages the C library keeps moves the peak of a run by up to 37 MB (measured,
        # 9 runs): the lesser of two runs is nearer to what is needed.
        least[layers] = min(
            peak_rss_bytes(
                QUANTIZE, str(source), str(folder / f"target-{layers}-{run}"), str(text_file)
            )
            for run in range(2)
        )
    return least


@pytest.mark.slow
def test_twelve_blocks_more_need_no_more_memory(peaks):
    # Two blocks allow for that noise; whatever held a sixth of every block would need more.
    assert peaks[16] - peaks[4] < 2 * BLOCK_BYTES, {n: p / 1e6 for n, p in peaks.items()}
