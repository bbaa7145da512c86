"""GGUF files: tensors, configuration, damage. Real files are compared in the slow tier."""

import math
import os
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType

from quatom.checkpoint.gguf_file import read_gguf
from quatom.checkpoint.gguf_rope import llama3_scaling
from quatom.checkpoint.reader import open_source
from quatom.checkpoint.tokenizer import tokenizer_from_source
from quatom.errors import CheckpointError, ModelError
from quatom.families.spec import Rope
from quatom.numerics.rotary import inverse_frequencies
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
    "a part by another name": ({"split.count": 3}, "says that it is part 0 of 3.* 0 of 1"),
    "a head count for each layer": ({"attention.head_count": "4"}, "one positive integer"),
    "no heads": ({"attention.head_count": 0}, "one positive integer"),
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
    write_gguf(path, extra={"blk.0.attn_q_norm.weight": torch.ones(16)})
    with pytest.raises(CheckpointError, match=r"holds blk.0.attn_q_norm.weight \(1 such"):
        open_source(path)


def test_every_truncation_is_an_error(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, quantization=GGMLQuantizationType.Q4_1)
    whole = path.read_bytes()
    last = max(t.start + t.num_bytes for t in read_gguf(path).tensors.values())
    for size in [0, 3, 4, 10, 30, 100, 500, 1000, 2000, 5000, last - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"truncated|no GGUF file|is empty") as caught:
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


@pytest.mark.parametrize(
    ("number", "name"),
    [
        (4, "Q4_2, which llama.cpp removed"),
        (31, "Q4_0_4_4, which llama.cpp removed"),
        (36, "IQ4_NL_4_4, which llama.cpp removed"),
        (152, "IQ5_KS of ik_llama.cpp"),
        (999, "unknown to the installed gguf package"),
        (15, "Q8_K"),  # intermediate results only; the gguf package has no code for it
    ],
)
def test_codings_that_are_not_read_are_named(tmp_path, number, name):
    path = tmp_path / "model.gguf"
    write_gguf(path)
    content = path.read_bytes()
    entry = content.index(b"blk.0.attn_q.weight") + len("blk.0.attn_q.weight")
    place = entry + 4 + 2 * 8  # behind the number of dimensions and two of them
    path.write_bytes(content[:place] + number.to_bytes(4, "little") + content[place + 4 :])
    with pytest.raises(
        ModelError, match=rf"tensor blk.0.attn_q.weight has GGML type {number}"
    ) as e:
        open_source(path)
    assert name in str(e.value)
    assert "another quantization" in str(e.value)


def test_capitals_and_projectors(tmp_path):
    write_gguf(tmp_path / "MODEL.GGUF")
    (tmp_path / "mmproj-model.gguf").write_bytes(b"GGUF of images")
    assert open_source(tmp_path).gguf == tmp_path / "MODEL.GGUF"
    assert open_source(tmp_path / "MODEL.GGUF").model_config.num_layers == 2


def split(path, count):
    """Cut a file's tensors into parts, as llama-gguf-split does; the first has all metadata."""
    from gguf import GGUFReader, GGUFWriter

    reader = GGUFReader(path)
    parts = []
    for number in range(count):
        name = path.with_name(f"{path.stem}-{number + 1:05d}-of-{count:05d}.gguf")
        writer = GGUFWriter(name, "llama")
        if number == 0:
            for key, field in reader.fields.items():
                if not key.startswith("GGUF.") and key != "general.architecture":
                    writer.add_key_value(key, field.contents(), field.types[0], *field.types[1:2])
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        for tensor in reader.tensors[number::count]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        parts.append(name)
    return parts


def test_split_files_are_one_model(tmp_path):
    (tmp_path / "whole").mkdir()
    whole = tmp_path / "whole" / "model.gguf"
    expected = write_gguf(whole, quantization=GGMLQuantizationType.Q8_0)
    parts = [tmp_path / part.name for part in split(whole, 3)]
    for part in parts:
        (whole.parent / part.name).rename(part)
    for source in (open_source(tmp_path), open_source(parts[0]), open_source(parts[2])):
        assert source.gguf == parts[0]
        assert source.config_dict == open_source(whole).config_dict
        for name, tensor in expected.items():
            assert torch.equal(source.load(name), tensor), name
        assert tokenizer_from_source(source)("ab")["input_ids"] == [2, 3]
    before = open_source(tmp_path).fingerprint()
    other = parts[2].read_bytes()
    parts[2].write_bytes(other[:-100] + bytes(100))
    assert open_source(tmp_path).fingerprint() != before
    parts[2].write_bytes(parts[1].read_bytes())
    with pytest.raises(CheckpointError, match=r"00003-of-00003.gguf says that it is part 1 of 3"):
        open_source(tmp_path)
    parts[2].unlink()
    with pytest.raises(CheckpointError, match=r"00003-of-00003.gguf is missing") as caught:
        open_source(parts[0])
    assert "one of 3 parts" in str(caught.value)


def llama3_table(theta, dim, factor, context=8192, low=1.0, high=4.0):
    """What llama.cpp's converter writes: frequencies in float32, then pair by pair."""
    frequencies = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    divisors = []
    for frequency in frequencies.tolist():
        wavelength = 2 * math.pi / frequency
        if wavelength < context / high:
            divisors.append(1.0)
        elif wavelength > context / low:
            divisors.append(factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(divisors, dtype=torch.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("theta", [500000.0, 1000000.0])
def test_a_table_of_llama_3_is_recognized_for_sure(theta, dim, factor):
    table = llama3_table(theta, dim, factor)
    found = llama3_scaling(table, theta)
    assert found["rope_type"] == "llama3"
    assert found["factor"] == factor
    others = [
        table.sqrt(),
        llama3_table(theta, dim, factor, context=8000),
        llama3_table(theta, dim, factor, high=4.1),
        llama3_table(theta, dim, factor, low=1.1),
        llama3_table(theta * 1.01, dim, factor),
        table * 1.001,
        torch.where(table > 1, factor, 1.0),
        torch.full_like(table, torch.nan),
    ]
    for other in others:
        assert llama3_scaling(other, theta) is None


def test_a_file_of_llama_3_has_its_scaling(tmp_path):
    path = tmp_path / "model.gguf"
    table = llama3_table(500000.0, 32, 8.0)
    write_gguf(path, change={"rope.freq_base": 500000.0}, extra={"rope_freqs.weight": table})
    scaling = open_source(path).model_config.layers[0].attention.rope.scaling
    assert (scaling.kind, scaling.factor, scaling.original_max_position) == ("llama3", 8.0, 8192)
    path.unlink()
    write_gguf(path, extra={"rope_freqs.weight": torch.ones(16)})
    assert open_source(path).model_config.layers[0].attention.rope.scaling is None
    path.unlink()
    table = torch.linspace(1.0, 7.0, 16)  # another scaling: the table itself is kept
    write_gguf(path, extra={"rope_freqs.weight": table})
    rope = open_source(path).model_config.layers[0].attention.rope
    plain = inverse_frequencies(Rope(theta=50000.0, dim=32), 100)
    # One division in float32, after the base's power or within it.
    assert torch.allclose(inverse_frequencies(rope, 100), plain / table, rtol=2**-22, atol=0)
    assert rope.scaling.attention_factor == 1.0
    path.unlink()
    write_gguf(path, extra={"rope_freqs.weight": table.neg()})
    with pytest.raises(CheckpointError, match=r"by -7 to -1, which must be positive"):
        open_source(path)
    path.unlink()
    write_gguf(path, extra={"rope_freqs.weight": torch.ones(8)})
    with pytest.raises(ModelError, match=r"rope_freqs.weight of shape \(8,\)"):
        open_source(path)


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
