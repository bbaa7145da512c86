"""Token strings, bytes and offsets of the HTTP API join to the text, streamed and whole alike."""

import json

import httpx
import pytest

from quatom.engine.config import EngineConfig
from quatom.engine.engine import Engine
from tests.engine.doubles import byte_tokenizer, hash_loaded
from tests.engine.vocabularies import encoding_llama, ids_of
from tests.serving.conftest import running_server

LLAMA = encoding_llama()
BYTES = byte_tokenizer()
TOKENIZERS = {"llama": LLAMA, "bytes": BYTES}
MAX_LENGTH = 64


@pytest.fixture(scope="module", params=sorted(TOKENIZERS))
def server(request):
    tokenizer = TOKENIZERS[request.param]
    loaded = hash_loaded(tokenizer=tokenizer, max_position=MAX_LENGTH)
    config = EngineConfig(
        max_num_seqs=16, max_num_batched_tokens=80, block_size=16, kv_cache_memory=200 * 16 * 8
    )
    with running_server(Engine(loaded, config)) as running:
        running.tokenizer = tokenizer
        yield running


def post(server, path="completions", **body):
    body = {"model": "hash", "temperature": 0, **body}
    response = httpx.post(f"{server.url}/v1/{path}", json=body, timeout=30)
    assert response.status_code == 200, response.text
    return response


def stream(server, **body):
    """The choices and the usage of a stream, put together."""
    options = {"stream": True, "stream_options": {"include_usage": True}}
    lines = post(server, **body, **options).text.split("\n\n")
    chunks = [json.loads(line[6:]) for line in lines if line and line != "data: [DONE]"]
    choices, usage = {}, chunks[-1]["usage"]
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        whole = choices.setdefault(choice["index"], {**choice, "text": "", "logprobs": None})
        whole["text"] += choice["text"]
        whole["finish_reason"] = choice["finish_reason"] or whole["finish_reason"]
        if choice["logprobs"] is not None:
            before = whole["logprobs"] or {key: [] for key in choice["logprobs"]}
            whole["logprobs"] = {k: before[k] + v for k, v in choice["logprobs"].items()}
    return [choices[index] for index in sorted(choices)], usage


PROMPTS = {
    "text": "a true 你 b",
    "text with a special token": "a <|end|>b",
    "ids": [5, 6, 7],
    "ids that end inside a character": "你",
    "several": ["a", "true a", "b"],
}


def prompt_of(server, name):
    if name != "ids that end inside a character":
        return PROMPTS[name]
    parts = list("你".encode()[:2])
    if server.tokenizer is LLAMA:
        parts = ids_of(LLAMA, "▁a", *(f"<0x{b:02X}>" for b in parts))
    return parts


@pytest.mark.parametrize("name", sorted(PROMPTS))
@pytest.mark.parametrize(
    ("echo", "n", "max_tokens"), [(True, 1, 0), (True, 3, 0), (True, 3, 20), (False, 1, 20)]
)
def test_a_stream_is_the_whole_answer(server, name, echo, n, max_tokens):
    body = dict(prompt=prompt_of(server, name), echo=echo, n=n, max_tokens=max_tokens, logprobs=2)
    whole = post(server, **body).json()
    choices, usage = stream(server, **body)
    for choice in (*choices, *whole["choices"]):
        assert choice["finish_reason"] == "length"
    assert choices == whole["choices"]
    prompts = whole["usage"]["prompt_tokens"]
    assert whole["usage"]["completion_tokens"] == max_tokens * len(choices)
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (
        prompts,
        max_tokens * len(choices),
    )
    for choice in choices:
        count = len(choice["logprobs"]["tokens"])
        assert all(len(column) == count for column in choice["logprobs"].values())
        places = choice["logprobs"]["text_offset"]
        assert places == sorted(places)
        for place, token in zip(places, choice["logprobs"]["tokens"], strict=True):
            shown = choice["text"][place:].startswith((token, token.removeprefix(" ")))
            if not token.startswith("bytes:") and "\ufffd" not in choice["text"]:
                assert shown or token in ("<s>", "<|end|>")


def test_echoed_text_and_its_tokens():
    loaded = hash_loaded(tokenizer=LLAMA, max_position=MAX_LENGTH)
    with running_server(Engine(loaded, EngineConfig(kv_cache_memory=200 * 32 * 8))) as server:
        body = dict(prompt="a true 你好", echo=True, max_tokens=0, logprobs=1)
        choice = post(server, **body).json()["choices"][0]
    assert choice["text"] == "a true 你好"
    made = choice["logprobs"]
    partial = [r"bytes:\xe5", r"bytes:\xa5", r"bytes:\xbd"]
    assert made["tokens"] == ["<s>", " a", " true", " ", "你", *partial]
    assert made["text_offset"] == [0, 0, 1, 6, 7, 8, 8, 8]
    assert made["token_logprobs"][0] == 0.0
    assert made["top_logprobs"][0] == {}


def test_bytes_of_a_chat_are_those_of_its_tokens(server):
    body = dict(messages=[{"role": "user", "content": "a true"}], max_tokens=40, logprobs=True)
    made = post(server, "chat/completions", top_logprobs=5, return_token_ids=True, **body).json()
    choice = made["choices"][0]
    content = choice["logprobs"]["content"]
    strings = server.tokenizer.convert_ids_to_tokens(choice["token_ids"])
    for string, entry in zip(strings, content, strict=True):
        data = bytes(entry["bytes"])
        if string.startswith("<0x"):
            assert data == bytes.fromhex(string[3:5])
        elif server.tokenizer is LLAMA:
            assert data.decode() == string.replace("▁", " ")
        assert entry["token"] == data.decode(errors="backslashreplace")
        assert entry["top_logprobs"][0] == {k: entry[k] for k in ("token", "logprob", "bytes")}
    joined = b"".join(bytes(entry["bytes"]) for entry in content)
    assert joined.decode(errors="ignore") == choice["message"]["content"].replace("\ufffd", "")


def test_alternatives_with_and_without_a_space_differ():
    # A bias of 60 makes both the most likely ones; log-probabilities are the model's own.
    true, spaced, byte, letter = ids_of(LLAMA, "true", "▁true", "<0x61>", "a")
    loaded = hash_loaded(tokenizer=LLAMA, max_position=MAX_LENGTH)
    with running_server(Engine(loaded, EngineConfig(kv_cache_memory=200 * 32 * 8))) as server:
        strings = []
        for token_id in (true, spaced, byte, letter):
            body = dict(prompt=[5], max_tokens=1, logprobs=1, logit_bias={str(token_id): 100})
            made = post(server, **body).json()["choices"][0]
            strings.append(made["logprobs"]["tokens"][0])
            assert made["text"] == strings[-1]
            assert strings[-1] in made["logprobs"]["top_logprobs"][0]
        assert strings == ["true", " true", "a", "a"]
        shown = httpx.post(
            f"{server.url}/tokenize", json={"prompt": "a", "return_token_strs": True}
        )
        assert shown.json()["token_strs"] == ["<s>", " a"]


def test_a_character_over_byte_tokens(server):
    ids = list("a你😀😁".encode())
    if server.tokenizer is LLAMA:
        ids = ids_of(LLAMA, "a", *(f"<0x{b:02X}>" for b in "你😀😁".encode()))
    shown = httpx.post(f"{server.url}/detokenize", json={"tokens": ids}).json()["prompt"]
    assert shown == "a你😀😁"
    # The prompt ends inside a character, and a bias makes its last byte the next token.
    body = dict(prompt=ids[:3], max_tokens=1, echo=True, logit_bias={str(ids[3]): 100}, logprobs=0)
    choice = post(server, **body).json()["choices"][0]
    assert choice["text"] == "a你"
    assert choice["logprobs"]["text_offset"] == [0, 1, 1, 1]
    assert post(server, **body | {"echo": False}).json()["choices"][0]["text"] == "你"
    assert (
        post(server, **body | {"max_tokens": 0}).json()["choices"][0]["text"].startswith("a\ufffd")
    )
