"""GGUF files: tensors, configuration, damage. Real files are compared in the slow tier."""

import os
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType

from quatom.checkpoint.gguf_file import read_gguf
from quatom.checkpoint.reader import open_source
from quatom.errors import CheckpointError, ModelError
from quatom.families.spec import Rope
from tests.checkpoint.gguf_models import write_gguf


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_1", "Q5_0"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_tensors_come_back_in_hugging_face_order(tmp_path, architecture, kind):
    quantization = GGMLQuantizationType[kind]
    path = tmp_path / "model.gguf"
    expected = write_gguf(path, architecture=architecture, quantization=quantization)
    for source in (open_source(path), open_source(tmp_path)):
        assert source.gguf == path
        assert source.folder == tmp_path
        assert set(source.names()) == set(expected)
    for name, tensor in expected.items():
        assert source.dtype(name) == torch.float32
        assert torch.equal(source.load(name, source.shape(name)), tensor), name


@pytest.mark.parametrize("tied", [False, True])
def test_the_configuration(tmp_path, tied):
    write_gguf(tmp_path / "model.gguf", tied=tied)
    config = open_source(tmp_path).model_config
    layer = config.layers[0]
    attention = layer.attention
    assert (config.family, config.num_layers, config.vocab_size) == ("llama", 2, 24)
    assert (config.hidden_size, layer.feed_forward.size, config.max_position) == (128, 160, 128)
    assert (attention.num_heads, attention.num_kv_heads, attention.head_dim) == (4, 2, 32)
    assert attention.rope == Rope(theta=50000.0, dim=32)
    assert config.final_norm.eps == pytest.approx(1e-5, rel=1e-6)
    assert (config.bos_token_id, config.eos_token_ids) == (0, (1,))
    assert config.tie_word_embeddings == tied
    assert not any(linear.bias for linear in layer.linears["qkv"])


def test_metadata_that_is_read(tmp_path):
    path = tmp_path / "model.gguf"
    scaling = {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}
    write_gguf(path, change=scaling | {"tokenizer.ggml.eot_token_id": 7})
    config = open_source(path).model_config
    assert config.layers[0].attention.rope.scaling.factor == 2.0
    assert config.eos_token_ids == (1, 7)


REFUSED = {
    "yarn": ({"rope.scaling.type": "yarn"}, "rope.scaling.type 'yarn' is not supported"),
    "experts": ({"expert_count": 8}, r"metadata \['llama.expert_count'\] is unknown"),
    "partial rotary": ({"rope.dimension_count": 16}, "rotary embedding of 16 .* of 32 channels"),
    "one of several": ({"split.count": 3}, "is one of 3 parts; join them"),
    "no size": ({"block_count": None}, "lacks 'block_count'"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_metadata_that_is_refused(tmp_path, reason):
    change, message = REFUSED[reason]
    write_gguf(tmp_path / "model.gguf", change=change)
    with pytest.raises((ModelError, CheckpointError), match=message) as caught:
        open_source(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_tensors_that_are_missing_or_unknown(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, drop="blk.1.ffn_up.weight")
    with pytest.raises(CheckpointError, match=r"lacks model.layers.1.mlp.up_proj.weight \(1 of 21"):
        open_source(path)
    path.unlink()
    write_gguf(path, extra_tensors=("blk.0.attn_q_norm.weight",))
    with pytest.raises(CheckpointError, match=r"holds blk.0.attn_q_norm.weight \(1 such"):
        open_source(path)
    path.unlink()
    write_gguf(path, extra_tensors=("rope_freqs.weight",))
    with pytest.raises(ModelError, match=r"rope_freqs.weight .* is not supported"):
        open_source(path)


def test_every_truncation_is_an_error(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, quantization=GGMLQuantizationType.Q4_1)
    whole = path.read_bytes()
    last = max(t.start + t.num_bytes for t in read_gguf(path).tensors.values())
    for size in [0, 3, 4, 10, 30, 100, 500, 1000, 2000, 5000, last - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"truncated|no GGUF file") as caught:
            read_gguf(path)
        assert "\n" not in str(caught.value)


def test_damage_in_the_head_is_an_error(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path)
    whole = path.read_bytes()
    damages = {
        "no GGUF file": b"GGML" + whole[4:],
        "GGUF version 9": whole[:4] + b"\x09" + whole[5:],
        "truncated or damaged": whole[:16] + b"\xff" * 8 + whole[24:],  # metadata count
    }
    for message, content in damages.items():
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            read_gguf(path)


def real_models() -> list[Path]:
    """GGUF files named in QUATOM_TEST_GGUF, separated by colons."""
    return [Path(p) for p in os.environ.get("QUATOM_TEST_GGUF", "").split(":") if p]


@pytest.mark.slow
@pytest.mark.parametrize("path", real_models(), ids=lambda path: path.name)
def test_real_files_equal_transformers_bit_by_bit(path):
    from transformers import AutoModelForCausalLM, GgufConfig

    source = open_source(path)
    theirs = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    ).state_dict()
    for name in source.names():
        assert torch.equal(source.load(name), theirs[name]), name
    extra = theirs.keys() - set(source.names())
    assert extra == ({"lm_head.weight"} if source.model_config.tie_word_embeddings else set())
