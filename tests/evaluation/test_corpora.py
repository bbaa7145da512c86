"""Corpora: the text that is scored, byte for byte, and where it may come from."""

import gzip
import json
import random

import pytest
import torch

from quatom.errors import CalibrationError
from quatom.evaluation.corpora import c4_windows, load_corpus, ptb_sentences, wikitext_rows
from tests.conftest import SHARED_DATA, write_byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def decode(corpus) -> str:
    return bytes_of(corpus.tokens).decode()


def bytes_of(tokens) -> bytes:
    """Undo the byte tokenizer: ids are ranks in the byte-level alphabet."""
    from tokenizers import pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    byte = {symbol: value for value, symbol in bytes_to_unicode().items()}
    return bytes(byte[alphabet[token]] for token in tokens.tolist())


def test_wikitext_rows_are_lines_with_their_newline_and_blank_lines_are_empty_rows():
    # Worked out from the hub's rows: "", " = A = \n", "", " text \n", joined with two newlines.
    assert wikitext_rows(" \n = A = \n \n text \n") == "\n\n = A = \n\n\n\n\n text \n"


def test_wikitext_rows_end_at_line_feeds_only():
    text = " a \u2028 b \x85 c \x0c d \n"
    assert wikitext_rows(text) == text


def test_windows_line_ends_change_nothing():
    text = " \n = A = \n \n text \n"
    assert wikitext_rows(text.replace("\n", "\r\n")) == wikitext_rows(text)
    assert ptb_sentences(text.replace("\n", "\r\n")) == ptb_sentences(text)


def test_ptb_sentences_are_stripped_lines():
    assert ptb_sentences(" no it was n't \n but <unk> \n") == "no it was n't\n\nbut <unk>"


@pytest.mark.parametrize(
    ("file", "text", "name", "want"),
    [
        ("wiki.test.raw", " \n = A = \n", "wikitext2", "\n\n = A = \n"),
        ("ptb.valid.txt", " a b \n c \n", "ptb", "a b\n\nc"),
        ("notes.txt", " a b \n c \n", "notes.txt", " a b \n c \n"),
        ("some.jsonl", '{"text": "a"}\n\n{"text": "b "}\n', "some.jsonl", "a\n\nb "),
    ],
)
def test_a_file_is_read_by_the_protocol_of_its_name(tmp_path, tokenizer, file, text, name, want):
    (tmp_path / file).write_text(text)
    corpus = load_corpus(tmp_path / file, tokenizer)
    assert (corpus.name, decode(corpus)) == (name, want)


def test_a_named_corpus_is_found_in_the_data_folder_or_in_its_own(tmp_path, tokenizer):
    (tmp_path / "ptb.valid.txt").write_text(" a \n")
    assert decode(load_corpus("ptb", tokenizer, data_dir=tmp_path)) == "a"
    (tmp_path / "ptb").mkdir()
    (tmp_path / "ptb" / "ptb.valid.txt").write_text(" b \n")
    assert decode(load_corpus("ptb", tokenizer, data_dir=tmp_path)) == "b"


def test_a_missing_corpus_names_the_file_and_where_to_put_it(tmp_path, tokenizer):
    with pytest.raises(CalibrationError, match=r"put wiki\.test\.raw into .*wikitext2"):
        load_corpus("wikitext2", tokenizer, data_dir=tmp_path)


def test_without_a_hub_the_error_says_what_to_give(monkeypatch, tokenizer):
    datasets = pytest.importorskip("datasets", reason="needs the extra 'eval'")

    def offline(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(CalibrationError, match=r"no route to host; put ptb\.valid\.txt into"):
        load_corpus("ptb", tokenizer)


def test_hub_rows_and_the_raw_file_give_the_same_text(monkeypatch, tmp_path, tokenizer):
    datasets = pytest.importorskip("datasets", reason="needs the extra 'eval'")
    rows = [{"text": ""}, {"text": " = A = \n"}, {"text": ""}, {"text": " text \n"}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    (tmp_path / "wiki.test.raw").write_text(" \n = A = \n \n text \n")
    hub = load_corpus("wikitext2", tokenizer)
    assert torch.equal(hub.tokens, load_corpus(tmp_path / "wiki.test.raw", tokenizer).tokens)


DOCUMENTS = ["short", "abcdefghij" * 3, "0123456789" * 2, "tiny"]


def test_c4_windows_follow_the_published_draws(tokenizer):
    """The protocol's draws: documents until one fits, then a start below length - window."""
    draw = random.Random(0)
    want = []
    while len(want) < 5:
        text = DOCUMENTS[draw.randint(0, len(DOCUMENTS) - 1)]
        if len(text) >= 16:
            start = draw.randint(0, len(text) - 16 - 1)
            want.append(text[start : start + 16].encode())
    windows = c4_windows(DOCUMENTS, tokenizer, sequence_length=16, count=5)
    assert [bytes_of(window) for window in windows] == want


def test_c4_is_read_gzipped_and_cut_where_it_was_drawn(tmp_path, tokenizer):
    path = tmp_path / "c4-validation.00000-of-00008.json.gz"
    lines = "".join(json.dumps({"text": text, "url": ""}) + "\n" for text in DOCUMENTS)
    path.write_bytes(gzip.compress(lines.encode()))
    corpus = load_corpus("c4", tokenizer, sequence_length=16, data_dir=tmp_path)
    assert corpus.name == "c4"
    want = c4_windows(DOCUMENTS, tokenizer, sequence_length=16)
    assert torch.equal(corpus.tokens.view(256, 16), want)


@pytest.mark.parametrize("documents", [[], ["short", "tiny"]])
def test_documents_that_are_all_too_short_end_the_search(documents, tokenizer):
    with pytest.raises(CalibrationError, match="has 16 tokens"):
        c4_windows(documents, tokenizer, sequence_length=16)


def test_a_document_of_exactly_one_window_has_one_place(tokenizer):
    windows = c4_windows(["0123456789abcdef"], tokenizer, sequence_length=16, count=2)
    assert bytes_of(windows[1]) == b"0123456789abcdef"


def test_a_file_that_is_no_c4_shard_is_refused(tmp_path, tokenizer):
    path = tmp_path / "c4-validation.00000-of-00008.json"
    path.write_text('{"body": 1}\n')
    with pytest.raises(CalibrationError, match="every row must have a 'text'"):
        load_corpus(path, tokenizer)


@pytest.mark.skipif(
    not (SHARED_DATA / "wikitext2").is_dir(), reason="needs ../shared/data/wikitext2"
)
def test_the_official_file_has_the_hub_rows():
    text = (SHARED_DATA / "wikitext2" / "wiki.test.raw").read_text(encoding="utf-8")
    # 4358 rows on the hub, of which 2891 are not empty: 4357 separators and 2891 newlines.
    joined = wikitext_rows(text)
    assert joined.count("\n") == 2 * 4357 + 2891
    assert joined.startswith("\n\n = Robert Boulter = \n\n\n")
