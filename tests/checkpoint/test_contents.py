"""Files that are not what their names say, and JSON that two readers understand differently."""

import json
import os
import shutil

import pytest

from quatom.checkpoint.reader import open_source
from quatom.checkpoint.tokenizer import find_tokenizer
from quatom.errors import CheckpointError
from quatom.json_text import parse_json
from tests.checkpoint.gguf_models import write_gguf
from tests.checkpoint.models import write_model
from tests.conftest import write_byte_tokenizer

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 123456\n"
PIPE = object()
OTHERS = {
    "a pointer": (POINTER, r"is a pointer of Git LFS, not the file itself; run git lfs pull"),
    "a page": (b"\n<!DOCTYPE html><html></html>", r"is a web page, not the file itself"),
    "nothing": (b"", r"is empty; download it again"),
    "a byte order mark": (b"\xef\xbb\xbf{}", r"begins with a byte order mark; save it as UTF-8"),
    "UTF-16": ("{}".encode("utf-16"), r"is UTF-16 text; save it as UTF-8"),
    "a folder": (None, r"is a folder, and a file of that name is needed"),
    "a broken link": ("gone", r"is a link to .*gone, which is not there; download it again"),
    "a pipe": (PIPE, r"is a pipe, socket or device, and a file of that name is needed"),
}
TEXTS = [
    "added_tokens.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
]
BINARIES = [
    "model.safetensors",
    "model-00001-of-00002.safetensors",
    "model.gguf",
    "tokenizer.model",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("whole") / "model")
    write_byte_tokenizer(folder)
    return folder


def put(file, content):
    file.unlink(missing_ok=True)
    if content is None:
        file.mkdir()
    elif content is PIPE:
        os.mkfifo(file)
    elif isinstance(content, str):
        file.symlink_to(file.parent / content)
    else:
        file.write_bytes(content)


@pytest.mark.parametrize("what", OTHERS)
@pytest.mark.parametrize("name", TEXTS)
def test_text_that_is_something_else(name, what, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "model")
    content, message = OTHERS[what]
    put(folder / name, content)
    if (name, what) == ("chat_template.jinja", "nothing"):  # a model without a template
        assert not find_tokenizer(open_source(folder)).chat_template
        return
    with pytest.raises(CheckpointError, match=rf"{name} {message}") as caught:
        find_tokenizer(open_source(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("what", [w for w in OTHERS if w not in ("a byte order mark", "UTF-16")])
@pytest.mark.parametrize("name", BINARIES)
def test_binary_files_that_are_something_else(name, what, whole, tmp_path):
    folder = tmp_path / "model"
    if name == "model.gguf":
        folder.mkdir()
        write_gguf(folder / name)
    elif name == "tokenizer.model":
        shutil.copytree(whole, folder)
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").unlink()
    else:
        write_model(folder, shards=1 if name == "model.safetensors" else 2)
    content, message = OTHERS[what]
    put(folder / name, content)
    with pytest.raises(CheckpointError, match=rf"{name} {message}"):
        find_tokenizer(open_source(folder))
    if (name, what) == ("model.gguf", "a broken link"):
        with pytest.raises(CheckpointError, match=rf"{name} {message}"):
            open_source(folder / name)


AMBIGUOUS = {
    "two values": (b'{"a": {"b": 1, "b": 2}}', "the key 'b' has two values, 1 and 2; keep one"),
    "NaN": (b'{"a": [NaN]}', "it holds NaN, which JSON does not have"),
    "infinity": (b'{"a": -Infinity}', "it holds -Infinity, which"),
    "half a pair": (b'{"a": "x\\ud83dy"}', r"it holds '\\ud83d', half of a surrogate pair"),
    "half a pair in a key": (b'{"\\udc00": 1}', r"it holds '\\udc00'"),
    "too deep": (b'{"a": ' + b"[" * 100_000, "its values are nested too deeply to be read"),
}


@pytest.mark.parametrize("kind", AMBIGUOUS)
def test_ambiguous_json_is_refused_wherever_it_is_read(kind, whole, tmp_path):
    text, message = AMBIGUOUS[kind]
    with pytest.raises(ValueError, match=message):
        parse_json(text)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        folder = shutil.copytree(whole, tmp_path / name)
        before = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        own = json.dumps(before)[:-1] + (", " if before else "")
        (folder / name).write_bytes(own.encode() + text[1:])
        with pytest.raises(CheckpointError, match=rf"{name} is no valid JSON: {message}"):
            find_tokenizer(open_source(folder))


def test_what_is_only_repeated_is_read():
    assert parse_json('{"a": 1, "a": 1, "b": "\\ud83d\\ude00"}') == {"a": 1, "b": "\U0001f600"}


@pytest.mark.parametrize("name", ["", "x" * 5000, "a\0b", "org/" + "x" * 5000 + "/y/z"])
def test_a_name_that_no_file_can_have_does_not_exist(name):
    with pytest.raises(CheckpointError, match="does not exist") as caught:
        open_source(name)
    assert len(str(caught.value)) < 300


def test_a_device_is_no_model():
    with pytest.raises(CheckpointError, match="/dev/null is neither a folder nor a file"):
        open_source("/dev/null")


def test_a_folder_that_may_not_be_read_is_named(whole, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != whole)  # root may read all
    with pytest.raises(CheckpointError, match=f"the folder {whole} cannot be read"):
        open_source(whole)
