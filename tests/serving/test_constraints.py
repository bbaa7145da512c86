"""Constraints over HTTP: every field that holds one, what is refused, and that nobody waits."""

import json
import re
import socket
import threading
import time

import httpx
import pytest

from quatom.engine.structured.masks import Matcher
from tests.serving.conftest import assert_idle, make_engine, running_server, wait_until

pytest.importorskip("llguidance")

CHOICES = ["positive", "negative"]
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}
TAG = {
    "type": "structural_tag",
    "format": {
        "type": "tag",
        "begin": "<b>",
        "content": {"type": "regex", "pattern": "[0-9]{2}"},
        "end": "</b>",
    },
}
OLD_TAG = {
    "type": "structural_tag",
    "structures": [{"begin": "<b>", "schema": SCHEMA, "end": "</b>"}],
    "triggers": ["<b>"],
}
PROMPTS = {
    "/v1/completions": {"prompt": "x"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
}
DEEP = "start: r0\n" + "".join(f'r{i}: r{i + 1} "b"\n' for i in range(4000)) + 'r4000: "a"'
TOO_LONG = {"type": "integer", "multipleOf": 999_983}


def post(url, path, **fields):
    body = {"model": "hash", "max_tokens": 80, "seed": 1, **PROMPTS[path], **fields}
    return httpx.post(url + path, json=body, timeout=120)


def text_of(response):
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    return choice["text"] if "text" in choice else choice["message"]["content"]


def is_json(text):
    return json.loads(text) in ({"ok": True}, {"ok": False})


FORMS = {
    "structured_outputs.choice": (
        {"structured_outputs": {"choice": CHOICES}},
        lambda t: t in CHOICES,
    ),
    "structured_outputs.json": ({"structured_outputs": {"json": SCHEMA}}, is_json),
    "structured_outputs.json as text": (
        {"structured_outputs": {"json": json.dumps(SCHEMA)}},
        is_json,
    ),
    "structured_outputs.regex": (
        {"structured_outputs": {"regex": "[ab]{3}"}},
        re.compile("[ab]{3}").fullmatch,
    ),
    "structured_outputs.grammar": (
        {"structured_outputs": {"grammar": 'root ::= "a" | "b"'}},
        lambda t: t in "ab",
    ),
    "structured_outputs.structural_tag": (
        {"structured_outputs": {"structural_tag": json.dumps(TAG)}},
        re.compile("<b>[0-9]{2}</b>").fullmatch,
    ),
    "guided_choice": ({"guided_choice": CHOICES}, lambda t: t in CHOICES),
    "guided_json": ({"guided_json": SCHEMA}, is_json),
    "guided_regex": ({"guided_regex": "[ab]{3}"}, re.compile("[ab]{3}").fullmatch),
    "guided_grammar": ({"guided_grammar": 'start: "a" | "b"'}, lambda t: t in "ab"),
    "response_format.json_schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
        is_json,
    ),
    "response_format.structural_tag": (
        {"response_format": TAG},
        re.compile("<b>[0-9]{2}</b>").fullmatch,
    ),
    "response_format.structural_tag of the older form": (
        {"response_format": OLD_TAG},
        lambda t: "<b>" not in t or '<b>{"ok": ' in t,
    ),
}


@pytest.mark.parametrize("path", PROMPTS)
@pytest.mark.parametrize("name", FORMS)
def test_every_field_that_constrains(server, path, name):
    fields, fits = FORMS[name]
    text = text_of(post(server.url, path, **fields))
    assert fits(text), text


def test_streams_and_several_completions_are_constrained(server):
    many = post(server.url, "/v1/completions", n=8, guided_choice=CHOICES)
    assert {c["text"] for c in many.json()["choices"]} <= {*CHOICES}
    assert [c["finish_reason"] for c in many.json()["choices"]] == ["stop"] * 8
    streamed = post(server.url, "/v1/completions", stream=True, guided_choice=CHOICES)
    events = [line[6:] for line in streamed.text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    text = "".join(json.loads(e)["choices"][0]["text"] for e in events[:-1])
    assert text in CHOICES


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"guided_json": {"type": "array", "uniqueItems": True}}, "$.uniqueItems"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"schema": {"properties": {"a": {"not": {}}}}},
                }
            },
            "$.properties.a.not",
        ),
        ({"guided_regex": "(?=a)b"}, "lookahead"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": [""]}, "guided_choice"),
        ({"guided_grammar": "root ::= "}, "invalid grammar"),
        ({"structured_outputs": {"structural_tag": "{"}}, "invalid structural_tag"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "not for regex, choice at once"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "at once"),
        ({"guided_regex": "a", "bad_words": ["b"]}, "bad_words and structured output"),
        ({"guided_grammar": DEEP}, "nested too deeply"),
        ({"guided_regex": "a" * 100_001}, "100001 characters; at most 100000"),
        ({"logit_bias": {str(i): 1 for i in range(301)}}, "300"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_be_enforced_is_refused(server, fields, named):
    refused = post(server.url, "/v1/completions", **fields)
    assert refused.status_code == 400, refused.text
    assert named in refused.json()["error"]["message"]


def test_bad_words(server):
    free = text_of(post(server.url, "/v1/completions", temperature=0))
    word = next(w for w in (free[i : i + 2] for i in range(4, 60)) if w.isascii() and w.isalnum())
    held = text_of(post(server.url, "/v1/completions", temperature=0, bad_words=[word]))
    assert word not in held
    assert held[: free.index(word)] == free[: free.index(word)]


def test_a_constraint_that_turns_out_too_costly_is_the_requests_own_error(server, monkeypatch):
    """The trial looks at the first tokens; what comes later is bounded by counts."""

    def accept(matcher, token_id):
        matcher.fail("Too many items")
        return False

    monkeypatch.setattr(Matcher, "accept", accept)
    for path in PROMPTS:
        ended = post(server.url, path, guided_regex="a+")
        assert ended.status_code == 400, ended.text
        assert ended.json()["error"]["code"] == "constraint_too_costly"
        assert "Too many items" in ended.json()["error"]["message"]
        streamed = post(server.url, path, guided_regex="a+", stream=True)
        assert "constraint_too_costly" in streamed.text
        assert streamed.text.endswith("data: [DONE]\n\n")


def test_nobody_waits_for_a_constraint_of_somebody_else():
    """One request that uses up its budget and one with many biases; a neighbour streams."""
    with running_server(make_engine()) as server:
        post(server.url, "/v1/completions", guided_regex="a")  # the processes are there
        stop = threading.Event()
        gaps = []

        def neighbour():
            while not stop.is_set():
                started = time.monotonic()
                made = post(server.url, "/v1/completions", max_tokens=2)
                assert made.status_code == 200
                gaps.append(time.monotonic() - started)
                time.sleep(0.05)

        biases = {str(i): 0.5 for i in range(257)}
        bodies = ({"guided_json": TOO_LONG}, {"logit_bias": biases, "n": 16, "max_tokens": 20})
        busy = [
            threading.Thread(target=post, args=(server.url, "/v1/completions"), kwargs=body)
            for body in bodies
        ]
        watcher = threading.Thread(target=neighbour)
        for thread in [watcher, *busy]:
            thread.start()
        for thread in busy:
            thread.join()
        stop.set()
        watcher.join()
        assert len(gaps) > 5
        assert sorted(gaps)[len(gaps) // 2] < 0.5  # 10 ms alone; a trial shares its cores
        assert_idle(server.engine)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_compilation(stream):
    with running_server(make_engine()) as server:
        post(server.url, "/v1/completions", guided_regex="a")
        constraints = server.engine.requests.constraints
        body = json.dumps({"prompt": "x", "stream": stream, "guided_json": TOO_LONG}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(head.encode() + body)
            wait_until(lambda: any(t._job is not None for t in constraints._trials))
        left = time.monotonic()
        wait_until(lambda: all(t._job is None for t in constraints._trials))
        assert time.monotonic() - left < 1.0  # the budget is 2 s of CPU time
        assert_idle(server.engine)
