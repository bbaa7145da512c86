"""Texts that are far too long: refused at little cost, and nobody else waits for them."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from quatom.errors import RequestError
from quatom.serving.text_encoder import MARGIN, TextEncoder
from quatom.serving.threads import LARGE_BODY_BYTES, in_thread
from tests.engine.doubles import byte_tokenizer

LIMIT = 100


def counted(texts, monkeypatch):
    """Lengths of the texts that are encoded from here on."""
    lengths, ids = [], texts.ids
    monkeypatch.setattr(
        texts, "ids", lambda text, **options: (lengths.append(len(text)), ids(text, **options))[1]
    )
    return lengths


def test_the_work_follows_from_the_limit_and_not_from_the_text(monkeypatch):
    texts = TextEncoder(byte_tokenizer(), LIMIT)
    lengths = counted(texts, monkeypatch)
    with pytest.raises(RequestError, match=rf"1048576 characters.*limit is {LIMIT},"):
        texts.prompt_ids("a" * 2**20, special=False)
    # One character makes one token: the first part that exceeds the bar is less than twice as long,
    # and the parts before it are together no longer than it is.
    assert sum(lengths) < 4 * (LIMIT + MARGIN)


def test_long_words_are_not_taken_for_many_tokens(monkeypatch):
    word = "x" * 50
    core = Tokenizer(models.WordLevel({word: 0}, unk_token=word))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    texts = TextEncoder(PreTrainedTokenizerFast(tokenizer_object=core), LIMIT)
    lengths = counted(texts, monkeypatch)
    text = f"{word} " * (LIMIT + MARGIN)
    assert texts.prompt_ids(text, special=False) == [0] * (LIMIT + MARGIN)
    assert lengths[-1] == len(text)
    assert sum(lengths) < 3 * len(text)  # parts that double


def test_texts_are_encoded_at_the_same_time():
    long_one, go_on = threading.Event(), threading.Event()

    def encode(texts, **options):
        if texts == ["long"]:
            long_one.set()
            assert go_on.wait(30)
        return [SimpleNamespace(ids=[len(texts[0])])]

    core = SimpleNamespace(
        encode_batch_fast=encode, no_truncation=lambda: None, no_padding=lambda: None
    )
    texts = TextEncoder(SimpleNamespace(backend_tokenizer=core))
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(texts.ids, "long", special=True)
        assert long_one.wait(30)
        assert texts.ids("other", special=True) == [5]
        go_on.set()
        assert waiting.result() == [4]


def test_small_requests_do_not_wait_for_the_threads_of_large_ones():
    def request(size):
        return SimpleNamespace(state=SimpleNamespace(body_bytes=size))

    async def run():
        go_on = threading.Event()
        many = 100  # more than asyncio has threads
        large = [
            asyncio.ensure_future(in_thread(request(LARGE_BODY_BYTES + 1), lambda: go_on.wait(30)))
            for _ in range(many)
        ]
        await asyncio.sleep(0)
        assert await in_thread(request(LARGE_BODY_BYTES), lambda: go_on.is_set()) is False
        go_on.set()
        assert await asyncio.gather(*large) == [True] * many

    asyncio.run(run())


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("completions", lambda text: {"prompt": [text, text]}),
        ("chat/completions", lambda text: {"messages": [{"role": "user", "content": text}]}),
        ("responses", lambda text: {"input": text}),
        ("embeddings", lambda text: {"input": text}),
    ],
)
def test_every_route_refuses_them(server, path, body):
    answer = httpx.post(f"{server.url}/v1/{path}", json=body("a" * 2**20), timeout=30)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "characters, and the first 2048 alone have" in error["message"]


def test_their_tokens_can_be_counted(server):
    text = "a" * (LARGE_BODY_BYTES + 1)
    answer = httpx.post(f"{server.url}/tokenize", json={"prompt": text}, timeout=30).json()
    assert answer["count"] == len(text)
    back = httpx.post(f"{server.url}/detokenize", json={"tokens": answer["tokens"]}, timeout=30)
    assert back.json() == {"prompt": text}
