"""A minute of damaged requests: whatever comes, an answer below 500, and a server that lives."""

import json
import random
import socket
import time

import httpx
import pytest

from tests.serving.conftest import assert_server_idle

BODIES = [
    ("/v1/completions", {"model": "hash", "prompt": "hello", "max_tokens": 3, "stop": ["a", "b"]}),
    ("/v1/completions", {"prompt": [[1, 2], [3]], "echo": True, "logprobs": 2, "max_tokens": 1}),
    ("/v1/completions", {"prompt": "x", "stream": True, "seed": 1, "top_p": 0.5, "max_tokens": 4}),
    (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
            "max_tokens": 3,
            "response_format": {"type": "json_object"},
            "logit_bias": {"5": 1.5},
        },
    ),
    ("/tokenize", {"prompt": "hé", "add_special_tokens": True}),
    ("/detokenize", {"tokens": [104, 105]}),
]
ODD = [
    None,
    True,
    -1,
    0,
    1e308,
    2**63,
    -(2**64),
    "",
    "é\U0001f917",
    "\x00",
    [],
    {},
    [[]],
    [None],
    0.5,
    "1",
]
RAW = [
    b"GET / HTTP/1.1\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"\x16\x03\x01\x02\x00",
    b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 70_000 + b"\r\n\r\n",
]


def spoil(value, rng):
    """The same JSON with one place changed."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        return {**value, key: spoil(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.6:
        i = rng.randrange(len(value))
        return [*value[:i], spoil(value[i], rng), *value[i + 1 :]]
    return rng.choice(ODD)


def damage(raw, rng):
    """The same bytes with some of them changed, doubled or missing."""
    raw = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        i = rng.randrange(len(raw) + 1)
        match rng.randrange(3):
            case 0:
                raw[i : i + 1] = bytes([rng.randrange(256)])
            case 1:
                raw[i:i] = raw[i // 2 : i]
            case 2:
                del raw[i : i + rng.randint(1, 10)]
    return bytes(raw)


def fuzz(server, seed, *, count=None, seconds=None):
    """Send `count` requests, or as many as `seconds` allow."""
    rng = random.Random(seed)
    deadline, sent = time.monotonic() + (seconds or 0), 0
    with httpx.Client(timeout=60) as client:
        while time.monotonic() < deadline if count is None else sent < count:
            path, body = rng.choice(BODIES)
            if rng.random() < 0.05:
                with socket.create_connection(("127.0.0.1", server.port), timeout=10) as raw:
                    raw.sendall(damage(rng.choice(RAW), rng))
                continue
            body = json.dumps(spoil(body, rng)).encode()
            if rng.random() < 0.5:
                body = damage(body, rng)
            response = client.post(server.url + path, content=body)
            assert response.status_code < 500, (path, body, response.text)
            assert "server_error" not in response.text, (path, body, response.text)
            sent += 1
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert_server_idle(server)
    return sent


@pytest.mark.parametrize("number", [2**32, 2**63, 2**64, 10**30])
def test_numbers_that_fit_no_type(either_server, number):
    fields = dict.fromkeys(("n", "max_tokens", "min_tokens", "logprobs"), number)
    fields |= {"stop_token_ids": [number], "logit_bias": {str(number): 1}, "prompt": [1, number]}
    bodies = [{"prompt": "a", "max_tokens": 2, name: value} for name, value in fields.items()]
    bodies.append({"prompt": [[1], [number]], "echo": True, "logprobs": 1, "max_tokens": 0})
    bodies.append({"prompt": "a", "logit_bias": {"1" * 5000: 1}})
    asked = [("/v1/completions", body) for body in bodies]
    asked += [("/detokenize", {"tokens": [number]}), ("/v1/embeddings", {"input": [number]})]
    for path, body in asked:
        answer = httpx.post(either_server.url + path, json=body)
        assert answer.status_code == 400, (body, answer.text)
    body = {"prompt": "a", "max_tokens": 2, "top_k": number}  # more than the vocabulary: all of it
    assert httpx.post(f"{either_server.url}/v1/completions", json=body).status_code == (
        200 if number < 2**63 else 400
    )


def test_damaged_requests(either_server):
    assert fuzz(either_server, seed=1, count=100) == 100


@pytest.mark.slow
def test_a_minute_of_damaged_requests(either_server):
    assert fuzz(either_server, seed=int(time.time()), seconds=60) > 300  # 1,000 on a busy machine
