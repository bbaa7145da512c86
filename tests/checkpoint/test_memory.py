"""Streaming a model through reader and writer takes the memory of one block, however many."""

import sys

import pytest
import torch

from quatom.checkpoint.reader import open_source
from tests.checkpoint.gguf_models import write_gguf
from tests.checkpoint.models import CONFIG, write_model
from tests.checkpoint.rss import peak_rss_bytes

# 19.7 MB a block: pages of torch's own libraries and freed ones that the C library keeps count as
# resident and vary by up to 25 MB between runs.
BLOCK = CONFIG | {"hidden_size": 256, "intermediate_size": 6144}
BLOCK_BYTES = 4 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 256 * 6144)  # float32

# Freed heap pages go back to the system after each block, as in the quantizer.
COPY = """
import sys
from quatom.checkpoint.reader import open_source
from quatom.checkpoint.writer import CheckpointWriter
from quatom.plan import plan
from quatom.quantize.host_memory import return_free_memory
from quatom.presets import PRESETS

source = open_source(sys.argv[1])
writer = CheckpointWriter(sys.argv[2], source, plan(source.model_config, PRESETS["fp16"]))
for index in range(source.model_config.num_layers):
    prefix = f"model.layers.{index}."
    names = [name for name in source.names() if name.startswith(prefix)]
    writer.write_block(index, {name: source.load(name) for name in names})
    return_free_memory()
writer.finish()
"""


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_number_of_blocks(tmp_path):
    peaks = {}
    for blocks in (4, 16):
        config = BLOCK | {"num_hidden_layers": blocks}
        folder = write_model(tmp_path / f"{blocks}", config, shards=2)
        # The least of three runs is nearest to what is needed.
        peaks[blocks] = min(
            peak_rss_bytes(COPY, str(folder), str(tmp_path / f"{blocks}-copy-{run}"))
            for run in range(3)
        )
    # Whatever held a sixth of every block would need more.
    assert peaks[16] - peaks[4] < 2 * BLOCK_BYTES


def test_a_copied_model_keeps_every_bit(tmp_path, monkeypatch):
    write_gguf(tmp_path / "model.gguf")
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path), str(tmp_path / "copy")])
    exec(COPY, {})
    source, copy = open_source(tmp_path / "model.gguf"), open_source(tmp_path / "copy")
    assert copy.model_config == source.model_config
    for name in source.names():
        assert torch.equal(copy.load(name), source.load(name))
