"""What a server must survive: crowds, vanishing clients, nonsense, failing steps, a full queue."""

import ast
import asyncio
import json
import random
import re
import socket
import threading
from pathlib import Path

import httpx
import pytest

import quatom
from tests.engine.doubles import byte_tokenizer, expected_tokens
from tests.serving.conftest import (
    FAILS_ON,
    MODES,
    assert_server_idle,
    engine_in,
    make_engine,
    process_engine,
    running_server,
    wait_until,
)

TOKENIZER = byte_tokenizer()


def completion(prompt="hello", **fields):
    return {"model": "hash", "prompt": prompt, "temperature": 0, "max_tokens": 8, **fields}


async def read_stream(client, url, body):
    """(text, finish reason, usage) of a streamed completion; checks the framing on the way."""
    text, reason, usage, done = "", None, None, False
    async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        async for line in response.aiter_lines():
            if not line:
                continue
            assert line.startswith("data: ")
            assert not done
            if line == "data: [DONE]":
                done = True
                continue
            chunk = json.loads(line[6:])
            for choice in chunk["choices"]:
                text += choice["text"]
                reason = choice["finish_reason"] or reason
            usage = chunk.get("usage") or usage
    assert done
    return text, reason, usage


def test_two_hundred_streams_give_the_tokens_that_each_gives_alone():
    prompts = [f"request {i} " * (1 + i % 5) for i in range(200)]
    lengths = [5 + i % 20 for i in range(200)]

    async def main(url):
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(limits=limits, timeout=60) as client:
            bodies = [
                completion(p, max_tokens=n, stream=True, stream_options={"include_usage": True})
                for p, n in zip(prompts, lengths, strict=True)
            ]
            return await asyncio.gather(*(read_stream(client, url, body) for body in bodies))

    # So few blocks that sequences are preempted.
    with running_server(process_engine(num_blocks=40)) as server:
        results = asyncio.run(main(server.url))
        assert server.app.state.async_engine.stats.num_preemptions > 0
        assert_server_idle(server)
    for prompt, length, (text, reason, usage) in zip(prompts, lengths, results, strict=True):
        assert text == TOKENIZER.decode(expected_tokens(TOKENIZER.encode(prompt), length))
        assert (reason, usage["completion_tokens"]) == ("length", length)


def abandon(port, body, chunks):
    """Open a stream on a bare socket, read some of it, and close without a word."""
    payload = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(payload)}\r\n\r\n"
        connection.sendall(head.encode() + payload)
        for _ in range(chunks):
            if not connection.recv(512):
                break


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_vanish_free_their_blocks(either_server, stream):
    server = either_server
    rng = random.Random(3)

    def one(i):
        body = completion([i % 256] * 50, max_tokens=400, stream=stream, n=1 + i % 2)
        abandon(server.port, body, rng.randint(0, 4) if stream else 0)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_server_idle(server)


@pytest.mark.slow
def test_a_thousand_vanishing_clients(either_server):
    server = either_server
    for start in range(0, 1000, 50):
        threads = [
            threading.Thread(
                target=abandon,
                args=(server.port, completion([i % 256] * 20, max_tokens=300, stream=True), i % 7),
            )
            for i in range(start, start + 50)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert_server_idle(server)


NONSENSE = {
    "no JSON": b"{",
    "an array": b"[]",
    "empty": b"",
    "null": b"null",
    "invalid UTF-8": b'{"prompt": "\xff\xfe"}',
    "a lone surrogate": b'{"prompt": "\\ud800"}',
    "a NUL": b"\x00",
    "deep nesting": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep nesting of a field not known": b'{"z":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001,
    "NaN": b'{"prompt": "x", "temperature": NaN}',
    "infinity": b'{"prompt": "x", "temperature": 1e999}',
    "a huge integer": b'{"prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}",
    "a negative count": b'{"prompt": "x", "max_tokens": -1}',
    "n of zero": b'{"prompt": "x", "n": 0}',
    "n too large": b'{"prompt": "x", "n": 100000}',
    "a string for a number": b'{"prompt": "x", "temperature": "1"}',
    "a number for a string": b'{"prompt": 5}',
    "a float for a count": b'{"prompt": "x", "max_tokens": 1.5}',
    "a boolean for a count": b'{"prompt": "x", "max_tokens": true}',
    "mixed prompts": b'{"prompt": ["x", 5]}',
    "no prompts": b'{"prompt": []}',
    "an empty prompt": b'{"prompt": ""}',
    "an empty list of ids": b'{"prompt": [[]]}',
    "unknown ids": b'{"prompt": [999999]}',
    "negative ids": b'{"prompt": [-1]}',
    "a bias of no token": b'{"prompt": "x", "logit_bias": {"a": 1}}',
    "a bias beyond the vocabulary": b'{"prompt": "x", "logit_bias": {"99999999999999999999": 1}}',
    "too many logprobs": b'{"prompt": "x", "logprobs": 100000}',
    "an empty stop": b'{"prompt": "x", "stop": ""}',
    "too many stops": json.dumps({"prompt": "x", "stop": ["s"] * 100}).encode(),
    "an unknown format": b'{"prompt": "x", "response_format": {"type": "xml"}}',
    "a schema that is none": b'{"prompt": "x", "structured_outputs": {"json": "{"}}',
    "a recursive schema": b'{"prompt": "x", "structured_outputs": {"json": {"$ref": "#"}}}',
    "two constraints": b'{"prompt": "x", "structured_outputs": {"regex": "a", "grammar": "b"}}',
    "a broken grammar": b'{"prompt": "x", "structured_outputs": {"grammar": "root ::= "}}',
    "min above max": b'{"prompt": "x", "max_tokens": 2, "min_tokens": 3}',
}  # fmt: skip


@pytest.mark.parametrize("kind", NONSENSE)
def test_nonsense_is_refused_with_an_error_object(server, kind):
    response = httpx.post(f"{server.url}/v1/completions", content=NONSENSE[kind], timeout=30)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{}],
        ["hi"],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": 1, "content": "x"}],
        [{"role": "user", "content": "\udfff"}],
    ],
)
def test_odd_conversations_are_refused(server, messages):
    body = json.dumps({"messages": messages})
    response = httpx.post(f"{server.url}/v1/chat/completions", content=body, timeout=30)
    assert response.status_code == 400, response.text


def test_other_errors_are_error_objects_too(server):
    for method, path, status in [
        ("GET", "/nothing", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/../../etc/passwd", 404),
        ("GET", "/%2e%2e/%2e%2e/etc/passwd", 404),
    ]:
        response = httpx.request(method, server.url + path)
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_a_prompt_over_the_limit_is_refused_with_both_numbers(server):
    limit = server.engine.max_model_len
    for path, body in (
        ("/v1/completions", {"prompt": [7] * (limit + 3)}),
        ("/v1/completions", {"prompt": [7] * 10, "max_tokens": limit}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * (limit + 3)}]}),
    ):
        response = httpx.post(server.url + path, json=body)
        assert response.status_code == 400, response.text
        numbers = set(map(int, re.findall(r"\d+", response.json()["error"]["message"])))
        assert limit in numbers
        assert max(numbers) > limit


def test_nothing_from_a_model_is_executed():
    """Nothing unpickles, and nobody passes trust_remote_code."""
    package = Path(quatom.__file__).parent
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", "")}
                assert not names & {"pickle", "cloudpickle", "dill", "joblib", "shelve"}, path
            elif isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in ("torch.load", "eval", "exec"), path
                assert "trust_remote_code" not in {k.arg for k in node.keywords}, path


def test_huge_bodies_are_refused():
    with running_server(make_engine(), max_body_bytes=100_000) as server:
        big = json.dumps(completion("x" * 200_000))
        response = httpx.post(f"{server.url}/v1/completions", content=big)
        assert response.status_code == 413
        # Without a length in the header too.
        response = httpx.post(
            f"{server.url}/v1/completions", content=iter([b"x" * 60_000, b"x" * 60_000])
        )
        assert response.status_code == 413
        assert httpx.post(f"{server.url}/v1/completions", json=completion()).status_code == 200


def test_a_full_queue_answers_429_with_retry_after():
    with running_server(make_engine(max_num_seqs=1, max_waiting=2, step_seconds=0.02)) as server:
        engine = server.app.state.async_engine
        threads = []
        for i in range(3):
            body = completion([i + 1] * 40, max_tokens=5 if i else 100, stream=True)
            threads.append(threading.Thread(target=abandon, args=(server.port, body, 10_000)))
            threads[-1].start()
            wait_until(lambda n=i: engine.stats.running + engine.stats.waiting > n)
        # The first of the three takes 100 steps of 20 ms at least, the others wait for it.
        response = httpx.post(f"{server.url}/v1/completions", json=completion())
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["code"] == "queue_full"
        for thread in threads:
            thread.join()
        assert httpx.post(f"{server.url}/v1/completions", json=completion()).status_code == 200
        too_many = httpx.post(f"{server.url}/v1/completions", json=completion(["a", "b", "c"]))
        assert too_many.status_code == 429


def test_a_failing_step_fails_its_requests_and_not_the_server(either_server):
    url = f"{either_server.url}/v1/completions"
    for stream in (False, True):
        response = httpx.post(url, json=completion(FAILS_ON, stream=stream))
        if stream:
            assert "kernel failed" in response.text
            assert response.text.endswith("data: [DONE]\n\n")
        else:
            assert response.status_code == 500
            assert "kernel failed" in response.json()["error"]["message"]
        assert httpx.post(url, json=completion()).status_code == 200
    assert httpx.get(f"{either_server.url}/health").status_code == 200
    assert_server_idle(either_server)


def test_logits_that_are_no_numbers_fail_one_request():
    with running_server(make_engine(loaded_options={"nan_on": 200})) as server:
        response = httpx.post(f"{server.url}/v1/completions", json=completion([200]))
        assert response.status_code == 500
        assert "not numbers" in response.json()["error"]["message"]


@pytest.mark.parametrize("mode", MODES)
def test_an_engine_that_keeps_failing_stops_loudly(mode):
    with running_server(engine_in(mode, loaded_options={"fail_on": FAILS_ON})) as server:
        for _ in range(3):
            response = httpx.post(f"{server.url}/v1/completions", json=completion(FAILS_ON))
            assert response.status_code in (500, 503)
        wait_until(lambda: httpx.get(f"{server.url}/health").status_code == 503)
        response = httpx.post(f"{server.url}/v1/completions", json=completion())
        assert response.status_code == 503
        assert "stopped" in response.json()["error"]["message"]


def test_the_api_key_is_needed_by_everything_but_health_and_metrics():
    with running_server(make_engine(), api_keys=("sécret",)) as server:
        paths = ("/", "/v1/models", "/version", "/openapi.json", "/static/app.js", "/nothing")
        for path in paths:
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic ?"}):
                response = httpx.get(server.url + path, headers=headers)
                assert response.status_code == 401
                assert response.json()["error"]["code"] == "invalid_api_key"
        assert httpx.post(f"{server.url}/v1/completions", json=completion()).status_code == 401
        for path in ("/health", "/metrics"):
            assert httpx.get(server.url + path).status_code == 200
        key = {"Authorization": b"Bearer s\xc3\xa9cret"}
        assert httpx.get(f"{server.url}/v1/models", headers=key).status_code == 200
        assert httpx.get(f"{server.url}/v1/models", auth=("any", "sécret")).status_code == 200


def test_information_routes(server):
    assert httpx.get(f"{server.url}/health").content == b""
    assert httpx.head(f"{server.url}/metrics").status_code == 200
    assert httpx.get(f"{server.url}/version").json()["version"]
    card = httpx.get(f"{server.url}/v1/models").json()["data"][0]
    assert (card["id"], card["max_model_len"]) == ("hash", 512)
    given = httpx.get(f"{server.url}/version", headers={"X-Request-ID": "abc"})
    assert given.headers["x-request-id"] == "abc"


def test_tokenize_and_back(server):
    made = httpx.post(f"{server.url}/tokenize", json={"prompt": "héllo"}).json()
    assert made == {"count": 6, "max_model_len": 512, "tokens": list("héllo".encode())}
    back = httpx.post(f"{server.url}/detokenize", json={"tokens": made["tokens"]}).json()
    assert back == {"prompt": "héllo"}
    chat = httpx.post(
        f"{server.url}/tokenize", json={"messages": [{"role": "user", "content": "x"}]}
    ).json()
    assert chat["count"] == len("user: x\n") + 2
    refused = httpx.post(f"{server.url}/detokenize", json={"tokens": [300]})
    assert refused.status_code == 400


def metrics(server):
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def test_metrics_count_what_happened(either_server):
    assert_server_idle(either_server)
    before = metrics(either_server)
    httpx.post(f"{either_server.url}/v1/completions", json=completion("abc", n=2))
    after = metrics(either_server)
    values = {name: value - before.get(name, 0.0) for name, value in after.items()}
    label = '{model_name="hash"}'
    assert values[f"vllm:prompt_tokens_total{label}"] == 3
    assert values[f"vllm:generation_tokens_total{label}"] == 16
    assert after[f"vllm:num_requests_running{label}"] == 0
    assert values['vllm:request_success_total{finished_reason="length",model_name="hash"}'] == 2
    for name, count in [
        ("time_to_first_token_seconds", 2),
        ("inter_token_latency_seconds", 14),
        ("e2e_request_latency_seconds", 2),
        ("request_queue_time_seconds", 2),
    ]:
        assert values[f"vllm:{name}_count{label}"] == count


def test_chat_templates_run_in_a_sandbox():
    engine = make_engine()
    engine.tokenizer.chat_template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with running_server(engine) as server:
        body = {"messages": [{"role": "user", "content": "x"}]}
        response = httpx.post(f"{server.url}/v1/chat/completions", json=body)
        assert response.status_code == 400
        assert "unsafe" in response.json()["error"]["message"]
