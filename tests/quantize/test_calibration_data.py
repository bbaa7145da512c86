"""Calibration text: reading, tokenizing, and sampling by a seed."""

import pytest
import torch

from quatom.errors import CalibrationError
from quatom.quantize.calibration_data import (
    documentation_text,
    read_text,
    sample_sequences,
    tokenize,
)
from quatom.recipe import CalibrationSpec


class WordTokenizer:
    """Word i of the text is token i: windows are recognized by their numbers."""

    def __call__(self, text, **_):
        return {"input_ids": list(range(len(text.split())))}


def sample(count, length, seed=0, words=100):
    spec = CalibrationSpec(num_samples=count, sequence_length=length, seed=seed)
    return sample_sequences("w " * words, WordTokenizer(), spec, origin="notes.txt")


def test_windows_are_consecutive_tokens_of_the_text():
    got = sample(16, 10)
    assert got.shape == (16, 10)
    assert got.dtype == torch.int64
    assert (got.diff(dim=1) == 1).all()
    assert got.min() >= 0
    assert got.max() < 100
    assert len(got[:, 0].unique()) > 8


def test_the_seed_chooses_the_windows():
    assert torch.equal(sample(8, 10, seed=3), sample(8, 10, seed=3))
    assert not torch.equal(sample(8, 10, seed=3), sample(8, 10, seed=4))
    # More samples continue the same draw.
    assert torch.equal(sample(12, 10)[:8], sample(8, 10))


def test_the_first_and_the_last_window_can_be_drawn():
    assert set(sample(200, 98)[:, 0].tolist()) == {0, 1, 2}
    assert sample(3, 100)[:, 0].tolist() == [0, 0, 0]


def test_a_text_shorter_than_a_sequence_is_refused_with_both_numbers():
    with pytest.raises(CalibrationError, match=r"notes\.txt has 100 tokens, fewer .* of 101"):
        sample(1, 101)


def test_a_text_is_tokenized_as_the_model_begins_one(tiny_llama_dir):
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama_dir)
    text = "Grüße"
    tokens = tokenize(text, tokenizer)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == tokenizer(text)["input_ids"]
    assert tokenizer.decode(tokens, skip_special_tokens=True) == text


def test_reading(tmp_path):
    (tmp_path / "a.txt").write_text("Grüße\n", encoding="utf-8")
    assert read_text(tmp_path / "a.txt") == "Grüße\n"
    with pytest.raises(CalibrationError, match=r"b\.txt: no such text file"):
        read_text(tmp_path / "b.txt")
    with pytest.raises(CalibrationError, match="is a folder"):
        read_text(tmp_path)
    (tmp_path / "c.txt").write_bytes("Gr\xfc".encode("latin-1"))
    with pytest.raises(CalibrationError, match=r"c\.txt is not UTF-8 text \(byte 2\)"):
        read_text(tmp_path / "c.txt")
    with pytest.raises(CalibrationError, match=r"cannot read .*a\.txt/x: Not a directory"):
        read_text(tmp_path / "a.txt" / "x")


def test_the_documentation_is_half_a_megabyte_of_english():
    text = documentation_text()
    assert len(text) > 400_000
    assert text == documentation_text()
    assert "function" in text
