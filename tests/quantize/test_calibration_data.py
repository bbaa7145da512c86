"""Calibration text: reading, tokenizing, and sampling by a seed."""

import gzip
import json
import sys
from types import SimpleNamespace

import pytest
import torch

from quatom.checkpoint.tokenizer_folder import read_folder
from quatom.errors import CalibrationError
from quatom.quantize.calibration_data import (
    calibration_tokens,
    documentation_text,
    sample_sequences,
    tokenize,
)
from quatom.quantize.text_files import read_text
from quatom.recipe import CalibrationSpec
from tests.conftest import write_byte_tokenizer


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
    assert set(sample(3, 98)[:, 0].tolist()) == {0, 1, 2}
    assert sample(1, 100)[:, 0].tolist() == [0]


def test_windows_all_differ():
    assert len(sample(90, 11)[:, 0].unique()) == 90
    with pytest.raises(
        CalibrationError, match=r"notes\.txt has 100 tokens: only 1 of 4 calibration sequences"
    ):
        sample(4, 100)


def test_a_text_that_is_read_many_times_is_a_warning_with_the_numbers(caplog):
    sample(80, 10)  # 800 of 100 tokens
    assert not caplog.messages
    sample(81, 10)
    assert caplog.messages == [
        "notes.txt has 100 tokens for 81 calibration sequences of 10: each token is read 8.1 times "
        "on average; a longer text gives better statistics"
    ]


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
    (tmp_path / "a.txt").write_text("Gr\u00fc\u00dfe\n\x0c\ttab\n", encoding="utf-8")
    assert read_text(tmp_path / "a.txt") == "Gr\u00fc\u00dfe\n\x0c\ttab\n"
    (tmp_path / "bom.txt").write_text("a", encoding="utf-8-sig")
    assert read_text(tmp_path / "bom.txt") == "a"


UNREADABLE = {
    "b.txt": (None, r"b\.txt: no such text file"),
    "c.txt": ("Gr\xfc".encode("latin-1"), r"c\.txt is not UTF-8 text \(byte 2\)"),
    "nul.txt": (b"ab\0cd", r"nul\.txt is no text: it holds the control character 0 at character 2"),
    "escape": (b"\x1b[0m", r"control character 27 at character 0"),
    "utf16.txt": ("ab".encode("utf-16"), r"utf16\.txt is not UTF-8 text \(byte 0\)"),
    "rows.json": (
        b'[{"text": "a"}]',
        r"rows\.json is no plain text: give a \.txt file, or \.jsonl",
    ),
    "rows.parquet": (b"PAR1", r"rows\.parquet is no plain text"),
    "rows.csv": (b"a,b", r"rows\.csv is no plain text"),
    "weights.safetensors": (b"abcdefgh{}", "is no plain text"),
    "rows.txt": (
        b'\n{"text": "a"}\n{"text": "b"}\n',
        r"rows\.txt holds JSON lines \(name it \.jsonl\)",
    ),
    "list.txt": (b' [\n{"text": "a"}\n]', r"list\.txt holds JSON \(make it \.jsonl"),
    "x" * 300: (None, r"is no name of a file: give the name of a text file, not the text itself"),
    "a\0b": (None, "is no name of a file"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_is_no_text_is_refused(name, tmp_path):
    content, message = UNREADABLE[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=message):
        read_text(tmp_path / name)
    with pytest.raises(CalibrationError, match=message):
        calibrate(tmp_path / name)


def test_brackets_alone_are_no_json(tmp_path):
    for text in ("[Chapter 1]\nIt was a dark night.", "{x} is a set.\n{y} is another.", "[", "{}x"):
        (tmp_path / "a.txt").write_text(text)
        assert read_text(tmp_path / "a.txt") == text


def test_a_text_in_place_of_its_file(tokenizer):
    for text in ("The text itself. " * 50, "a line\nand another. " * 50, "a/b " * 2000):
        with pytest.raises(CalibrationError) as caught:
            calibrate(text, tokenizer)
        assert len(str(caught.value)) < 400
    with pytest.raises(CalibrationError, match="the name of a file or data set, got list"):
        calibrate(["a", "b"], tokenizer)
    with pytest.raises(CalibrationError, match=r"a data set of the hub is named ORGANIZATION/NAME"):
        calibrate("wikitext2", tokenizer)


def test_folders_are_no_text(tmp_path):
    (tmp_path / "a.txt").touch()
    with pytest.raises(CalibrationError, match="is a folder"):
        read_text(tmp_path)
    with pytest.raises(CalibrationError, match=r"cannot read .*a\.txt/x: Not a directory"):
        read_text(tmp_path / "a.txt" / "x")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(folder)
    return read_folder(folder)


def calibrate(origin, tokenizer=None, count=1, length=4, vocab_size=258):
    spec = CalibrationSpec(num_samples=count, sequence_length=length)
    return calibration_tokens(origin, tokenizer, spec, vocab_size)


def rows_file(folder, *rows, name="rows.jsonl"):
    (folder / name).write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return folder / name


def whole(file, tokenizer, text):
    """The text of the one window of a file that has as many tokens."""
    length = len(tokenizer.encode(text, add_special_tokens=False))
    return tokenizer.decode(calibrate(file, tokenizer, length=length)[0])


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.ndjson", "rows.jsonlines", "rows.JSONL.gz"])
def test_json_lines_give_their_text(name, tokenizer, tmp_path):
    rows = {"text": "one\ntwo", "id": float("nan")}, {"text": " \n"}, {"text": "{x}"}
    file = rows_file(tmp_path, *rows, name=name)
    if name.endswith(".gz"):
        packed = tmp_path / name
        packed.write_bytes(gzip.compress(file.read_bytes()))
        file = packed
    assert whole(file, tokenizer, "one\ntwo{x}") == "one\ntwo{x}"


def test_messages_go_through_the_chat_template(tokenizer, tmp_path):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    file = rows_file(tmp_path, {"messages": messages}, {"messages": messages[:1]})
    text = "<s>user: a\n<s>assistant: b\nassistant:<s>user: a\nassistant:"
    assert whole(file, tokenizer, text) == text


def test_padding_is_not_measured(tokenizer, tmp_path):
    padded = {"input_ids": [0, 0, 7, 8], "attention_mask": [0, 0, 1, 1]}
    file = rows_file(tmp_path, padded, {"input_ids": [9]}, padded)
    assert calibrate(file, tokenizer, length=5).tolist() == [[7, 8, 9, 7, 8]]


def test_columns_of_other_rows_are_null(tokenizer, tmp_path):
    none = {"text": None, "messages": None, "input_ids": None, "attention_mask": None}
    messages = [{"role": "user", "content": "a"}]
    given = {"text": "ab"}, {"messages": messages}, {"input_ids": [7], "attention_mask": [1]}
    want = calibrate(rows_file(tmp_path, *given), tokenizer, length=6)
    assert calibrate(
        rows_file(tmp_path, *(none | row for row in given)), tokenizer, length=6
    ).equal(want)


BAD_ROWS = {
    "no JSON": ("{", r"rows\.jsonl: line 1 is no JSON"),
    "a list": ("[1]", "line 1 is a list, no object"),
    "no text": (
        '{"body": "a", "text": null}',
        "every row must have a 'text', 'messages' or 'input_ids', one has body",
    ),
    "half of a pair": ('{"text": "ab\\ud83d"}', r"holds '\\ud83d', half .* at character 2; remove"),
    "half of a pair in a message": (
        '{"messages": [{"role": "user", "content": "\\udc00"}]}',
        r"holds '\\udc00', half of a surrogate pair",
    ),
    "ids that are no integers": ('{"input_ids": [1.5, 2, 3, 4]}', "must be lists of integers"),
    "ids that are true": ('{"input_ids": [true, true, true, true]}', "must be lists of integers"),
    "ids of several rows": ('{"input_ids": [[1, 2], [3, 4]]}', "must be lists of integers"),
    "ids beyond 64 bits": (f'{{"input_ids": [{2**63}]}}', "must be lists of integers"),
    "an empty mask": ('{"input_ids": [1, 2, 3, 4], "attention_mask": []}', "of one length"),
    "one mask for all": ('{"input_ids": [1, 2, 3, 4], "attention_mask": 1}', "of one length"),
    "a text that is a number": ('{"text": 3}', "every row must have a 'text'"),
    "masks of another length": (
        '{"input_ids": [1, 2], "attention_mask": [1]}',
        "input_ids and attention_mask must be lists",
    ),
    "ids that are words": ('{"input_ids": ["a"]}', "must be lists of integers"),
    "messages without roles": (
        '{"messages": [{"role": "user", "content": "x"}, {"content": "x"}]}',
        r"messages\[1\] must be an object with a role",
    ),
    "messages that are no objects": ('{"messages": [3]}', r"messages\[0\] must be an object"),
    "messages that are a number": ('{"messages": 3}', "rows.jsonl"),
    "nothing": ("", "has 0 tokens, fewer than one"),
}


@pytest.mark.parametrize("fault", BAD_ROWS)
def test_bad_rows_are_refused_in_one_line(fault, tokenizer, tmp_path):
    content, message = BAD_ROWS[fault]
    (tmp_path / "rows.jsonl").write_text(content + "\n")
    with pytest.raises(CalibrationError, match=message) as caught:
        calibrate(tmp_path / "rows.jsonl", tokenizer)
    assert "\n" not in str(caught.value)
    assert "rows.jsonl" in str(caught.value)


def test_a_token_that_the_model_does_not_have_is_refused(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("abc</s>d")
    assert calibrate(tmp_path / "a.txt", tokenizer).shape == (1, 4)
    message = "gives token id 257, and the model has 257 tokens, 0 to 256"
    with pytest.raises(CalibrationError, match=message):
        calibrate(tmp_path / "a.txt", tokenizer, vocab_size=257)


def test_data_sets_of_the_hub(tokenizer, monkeypatch):
    asked = []

    def load_dataset(name, config, split, streaming):
        asked.append((name, config, split, streaming))
        if name == "no/data":
            raise ConnectionError("no route\nsecond line")
        return ({"text": f"row {i:03d} "} for i in range(10**9))  # never read to its end

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert calibrate("some/data", tokenizer, 4, 8).shape == (4, 8)
    assert calibrate("some/data:english:validation", tokenizer, 4, 8).shape == (4, 8)
    assert calibrate("some/data::test", tokenizer, 4, 8).shape == (4, 8)
    assert asked == [
        ("some/data", None, "train", True),
        ("some/data", "english", "validation", True),
        ("some/data", None, "test", True),
    ]
    with pytest.raises(CalibrationError, match=r"no/data is no file and cannot .* no route") as e:
        calibrate("no/data", tokenizer)
    assert "\n" not in str(e.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError, match=r"which is not installed: pip install 'quatom"):
        calibrate("some/data", tokenizer)


def test_the_documentation_is_half_a_megabyte_of_english():
    text = documentation_text()
    assert len(text) > 400_000
    assert text == documentation_text()
    assert "function" in text
