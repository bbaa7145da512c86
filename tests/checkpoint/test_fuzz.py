"""Damaged and odd files: every outcome is an opened model or one line, never a traceback.

The short run is part of `make test`; the slow one takes 60 seconds. Both draw from a seed: a
failure names the number of the draw, which `replay` repeats.
"""

import json
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from quatom.checkpoint.reader import open_source
from quatom.checkpoint.tokenizer import tokenizer_from_source
from quatom.errors import QuatomError
from tests.checkpoint.gguf_models import write_gguf
from tests.checkpoint.models import CONFIG, write_model
from tests.conftest import LLAMA3_SCALING, write_byte_tokenizer

ODD = [None, True, False, 0, -1, 1, 3, 2**31, 2**63, 1e308, float("nan"), 0.5, "", "x", [], {}]
ODD += [[1], ["x", None], {"x": 1}, "\u0120", "../x", [[[]]]]
FULL = CONFIG | {
    "rope_scaling": LLAMA3_SCALING,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "head_dim": 32,
    "torch_dtype": "float32",
}


@dataclass(frozen=True)
class Target:
    """One file to damage, in a folder whose others are whole."""

    folder: str
    file: str


TARGETS = [
    Target("single", "config.json"),
    Target("single", "tokenizer.json"),
    Target("single", "tokenizer_config.json"),
    Target("single", "generation_config.json"),
    Target("single", "special_tokens_map.json"),
    Target("single", "added_tokens.json"),
    Target("single", "model.safetensors"),
    Target("sharded", "model.safetensors.index.json"),
    Target("gguf", "model.gguf"),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Folders that open, before anything is damaged."""
    root = tmp_path_factory.mktemp("fuzz")
    write_model(root / "single", CONFIG)
    write_byte_tokenizer(root / "single")
    (root / "single" / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    added = {"<s>": 256, "</s>": 257}
    (root / "single" / "added_tokens.json").write_text(json.dumps(added))
    (root / "single" / "special_tokens_map.json").write_text('{"unk_token": {"content": "<s>"}}')
    write_model(root / "sharded", CONFIG, shards=3)
    (root / "gguf").mkdir()
    write_gguf(root / "gguf" / "model.gguf")
    for folder in ("single", "sharded", "gguf"):
        assert open_source(root / folder).names()
    return root


def change_json(value, draw: random.Random):
    """A JSON value with one place replaced, removed, renamed or repeated."""
    if not isinstance(value, dict | list) or not value or draw.random() < 0.1:
        return draw.choice(ODD)
    key = draw.choice(sorted(value) if isinstance(value, dict) else range(len(value)))
    changed = dict(value) if isinstance(value, dict) else list(value)
    action = draw.random()
    if action < 0.15:
        del changed[key]
    elif action < 0.25 and isinstance(changed, dict):
        changed[key + "_"] = changed.pop(key)
    else:
        changed[key] = change_json(value[key], draw)
    return changed


def change_bytes(content: bytes, draw: random.Random, head: int) -> bytes:
    """Bytes with some replaced, removed, inserted or cut off, mostly in the head of the file."""
    for _ in range(draw.choice([1, 1, 2, 5])):
        at = draw.randrange(min(head, len(content)) or 1)
        kind = draw.random()
        piece = bytes(draw.randrange(256) for _ in range(draw.choice([1, 4, 8])))
        if kind < 0.6:
            content = content[:at] + piece + content[at + len(piece) :]
        elif kind < 0.75:
            content = content[:at] + content[at + len(piece) :]
        elif kind < 0.9:
            content = content[:at] + piece + content[at:]
        else:
            content = content[: draw.randrange(len(content) or 1)]
    return content


def change_header(content: bytes, draw: random.Random) -> bytes:
    """A safetensors file whose JSON header is changed and has the right length."""
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(change_json(json.loads(content[8 : 8 + length]), draw)).encode()
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def damage(folder: Path, file: str, draw: random.Random) -> None:
    path = folder / file
    content = path.read_bytes()
    if path.suffix == ".json" and draw.random() < 0.85:
        value = json.loads(content)
        if file == "config.json" and draw.random() < 0.5:
            value = FULL
        for _ in range(draw.choice([1, 1, 1, 2, 3])):
            value = change_json(value, draw)
        content = json.dumps(value).encode()
        if draw.random() < 0.05:  # a key twice
            content = content.replace(b"{", b'{"x": 1, "x": 2, ', 1)
    elif path.suffix == ".safetensors" and draw.random() < 0.6:
        content = change_header(content, draw)
    else:
        content = change_bytes(content, draw, 3000)
    path.write_bytes(content)


def replay(whole: Path, copy: Path, number: int) -> str:
    """Draw `number`: the file that was damaged and what came of it."""
    draw = random.Random(number)
    target = draw.choice(TARGETS)
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(whole / target.folder, copy)
    damage(copy, target.file, draw)
    try:
        source = open_source(copy)
        if target.folder != "sharded":
            tokenizer_from_source(source)("ab 12 <s>")
        for name in source.names()[:3]:
            source.load(name, source.shape(name))
        outcome = "read"
    except QuatomError as error:
        outcome = str(error)
        assert "\n" not in outcome, f"draw {number}, {target}: {outcome}"
    except BaseException as error:
        raise AssertionError(f"draw {number}, {target}: {type(error).__name__}") from error
    return outcome


def test_some_damaged_files(whole, tmp_path):
    outcomes = [replay(whole, tmp_path / "copy", number) for number in range(150)]
    assert 0 < outcomes.count("read") < len(outcomes)


@pytest.mark.slow
def test_damaged_files_for_a_minute(whole, tmp_path):
    number, end = 1000, time.monotonic() + 60.0
    while time.monotonic() < end:
        replay(whole, tmp_path / "copy", number)
        number += 1
    assert number > 2000
