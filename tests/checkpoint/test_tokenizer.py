"""Tokenizers of folders and GGUF files, and their copies in a checkpoint."""

import pytest

from quatom.checkpoint.reader import open_source
from quatom.checkpoint.tokenizer import tokenizer_from_source, write_tokenizer
from tests.checkpoint.gguf_models import WORDS, write_gguf
from tests.checkpoint.models import write_model

TEXT = "ab 123 h"
# The vocabulary can merge 1 2 3 and space 1; which it may, the pre-tokenizer says.
PIECES = {
    "smollm": ["a", "b", "\u0120", "1", "2", "3", "\u0120", "h"],
    "qwen2": ["a", "b", "\u0120", "1", "2", "3", "\u0120", "h"],
    "llama-bpe": ["a", "b", "\u0120", "123", "\u0120", "h"],
    "gpt-2": ["a", "b", "\u01201", "2", "3", "\u0120", "h"],
}


def reopen(source, folder):
    """A folder with config.json, weights and what write_tokenizer makes."""
    write_model(folder)
    write_tokenizer(source, folder)
    return open_source(folder)


@pytest.mark.parametrize("pre", PIECES)
def test_digits_are_cut_as_the_file_says(tmp_path, pre):
    write_gguf(tmp_path / "model.gguf", pre=pre)
    source = open_source(tmp_path / "model.gguf")
    tokenizer = tokenizer_from_source(source)
    assert tokenizer.tokenize(TEXT) == PIECES[pre]
    ids = tokenizer(f"<s>{TEXT}</s>", add_special_tokens=False)["input_ids"]
    assert ids == [0, *(WORDS.index(piece) for piece in PIECES[pre]), 1]
    assert tokenizer.decode(ids) == f"<s>{TEXT}</s>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == TEXT


def test_special_tokens_and_chat_template_come_from_the_metadata(tmp_path):
    write_gguf(tmp_path / "model.gguf")
    tokenizer = tokenizer_from_source(open_source(tmp_path))
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False)
    assert text == "<s>ab"


def test_a_written_gguf_tokenizer_reads_back_the_same(tmp_path):
    write_gguf(tmp_path / "model.gguf")
    source = open_source(tmp_path)
    copy = tokenizer_from_source(reopen(source, tmp_path / "copy"))
    original = tokenizer_from_source(source)
    assert copy(TEXT)["input_ids"] == original(TEXT)["input_ids"]
    assert copy.eos_token_id == original.eos_token_id
    assert copy.chat_template == original.chat_template


def test_tokenizer_files_of_a_folder_are_copied_byte_by_byte(tmp_path, tiny_llama_dir):
    source = open_source(tiny_llama_dir)
    (tmp_path / "copy").mkdir()
    write_tokenizer(source, tmp_path / "copy")
    names = {file.name for file in (tmp_path / "copy").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= names
    for name in names:
        original = (tiny_llama_dir / name).read_bytes()
        assert (tmp_path / "copy" / name).read_bytes() == original
    tokenizer = tokenizer_from_source(source)
    assert tokenizer.decode(tokenizer("Hi there")["input_ids"]) == "Hi there"


def test_tokenizer_files_beside_a_gguf_win(tmp_path, tiny_llama_dir):
    write_gguf(tmp_path / "model.gguf", pre="gemma")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_llama_dir / name).read_bytes())
    tokenizer = tokenizer_from_source(open_source(tmp_path / "model.gguf"))
    assert tokenizer("ab")["input_ids"] == tokenizer.convert_tokens_to_ids(["a", "b"])
