"""Sixty cases in the manner of BFCL: single, parallel and no calls of a model that knows nothing.

Its logits are pseudo-random, so whatever is right about a call comes from the constraint.
"""

import json
from contextlib import ExitStack

import httpx
import jsonschema
import pytest

from quatom.engine.config import EngineConfig
from quatom.engine.engine import Engine
from tests.engine.doubles import hash_loaded
from tests.serving.conftest import running_server
from tests.serving.scripted import scripted_tokenizer
from tests.serving.templates import SPECIAL, TEMPLATES

WORD = {"type": "string", "maxLength": 12}
CITY = {"enum": ["Bern", "Zürich", "São Paulo"]}


def parameters(required=(), **properties):
    return {"type": "object", "properties": properties, "required": list(required)}


FUNCTIONS = {
    "get_weather": parameters(["city"], city=CITY, unit={"enum": ["c", "f"]}),
    "add": parameters(["a", "b"], a={"type": "integer"}, b={"type": "integer"}),
    "area": parameters(["r"], r={"type": "number", "minimum": 0, "maximum": 100}),
    "now": parameters(),
    "set_alarm": parameters(
        ["hour"], hour={"type": "integer", "minimum": 0, "maximum": 23}, on={"type": "boolean"}
    ),
    "send": parameters(["to", "text"], to=WORD, text=WORD),
    "tag": parameters(["tags"], tags={"type": "array", "items": WORD, "maxItems": 3}),
    "book": parameters(["day"], day={"type": "string", "pattern": "^[0-9]{2}\\.[0-9]{2}$"}),
    "order": parameters(
        ["item"], item=parameters(["name", "count"], name=WORD, count={"enum": [1, 2, 3]})
    ),
    "route": parameters(
        ["stops"], stops={"type": "array", "items": CITY, "minItems": 2, "maxItems": 3}
    ),
    "pick": parameters(["value"], value={"anyOf": [{"type": "boolean"}, {"enum": ["x"]}]}),
    "maybe": parameters(["value"], value={"type": ["boolean", "null"]}),
    "fixed": parameters(["kind"], kind={"const": "fixed"}),
    "point": parameters(
        ["xy"], xy={"type": "array", "items": {"enum": [0, 1]}, "minItems": 2, "maxItems": 2}
    ),
    "flags": parameters(a={"type": "boolean"}, b={"type": "boolean"}),
    "switch": parameters(["on"], on={"type": "boolean"}),
    "rate": parameters(["stars"], stars={"type": "integer", "minimum": 1, "maximum": 5}),
    "quoted": parameters(["mark"], mark={"enum": ['"', "\\", "</tool_call>", "ü\n"]}),
    "deep": parameters(["a"], a=parameters(["b"], b=parameters(["c"], c={"enum": ["d"]}))),
    "name-with.dots_1": parameters(["x"], x={"enum": ["]", "}", "[/"]}),
}
NAMES = list(FUNCTIONS)
# Values that end soon: quotes and closing brackets are likely.
BIAS = {str(ord(char)): 4.0 for char in '"]})'}


FORMATS = ("hermes", "llama", "mistral-args", "granite")


@pytest.fixture(scope="module")
def urls():
    """A server of each format; cases take turns."""
    with ExitStack() as stack:
        urls = []
        for name in FORMATS:
            tokenizer = scripted_tokenizer(TEMPLATES[name], SPECIAL.get(name, ()))
            config = EngineConfig(
                max_num_seqs=16,
                max_num_batched_tokens=4096,
                block_size=16,
                kv_cache_memory=4000 * 16 * 8,
            )
            engine = Engine(hash_loaded(tokenizer=tokenizer, max_position=4096), config)
            urls.append(stack.enter_context(running_server(engine)).url)
        yield urls


def offered(*names):
    return [
        {"type": "function", "function": {"name": name, "parameters": FUNCTIONS[name]}}
        for name in names
    ]


def ask(url, text, **options):
    body = {
        "messages": [{"role": "user", "content": text}],
        "max_tokens": 1500,
        "logit_bias": BIAS,
        **options,
    }
    response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def check(choice, allowed):
    assert choice["finish_reason"] == "tool_calls", choice
    assert choice["message"]["content"] is None
    calls = choice["message"]["tool_calls"]
    for call in calls:
        assert call["function"]["name"] in allowed
        arguments = json.loads(call["function"]["arguments"])
        jsonschema.validate(arguments, FUNCTIONS[call["function"]["name"]])
    assert len({call["id"] for call in calls}) == len(calls)
    return calls


@pytest.mark.parametrize("i", range(20), ids=NAMES)
def test_single(urls, i):
    """One function, which is named, among others."""
    named = {"type": "function", "function": {"name": NAMES[i]}}
    tools = offered(NAMES[i], NAMES[i - 1])
    calls = check(ask(urls[i % 4], f"case {i}", tools=tools, tool_choice=named, seed=i), [NAMES[i]])
    assert len(calls) == 1


@pytest.mark.parametrize("i", range(20))
def test_parallel(urls, i):
    """Any number of calls of three functions."""
    names = [NAMES[(i + k) % 20] for k in (0, 7, 13)]
    check(
        ask(urls[i % 4], f"case {i}", tools=offered(*names), tool_choice="required", seed=i), names
    )


@pytest.mark.parametrize("i", range(20))
def test_no_call(urls, i):
    """Functions that may not be called, or that the model does not call."""
    choice = "none" if i % 2 else "auto"
    made = ask(
        urls[i % 4], f"case {i}", tools=offered(NAMES[i]), tool_choice=choice, seed=i, max_tokens=30
    )
    assert "tool_calls" not in made["message"]
    assert made["finish_reason"] in ("length", "stop")


def test_some_answers_had_several_calls(urls):
    options = {"tools": offered("now", "fixed"), "tool_choice": "required"}
    several = [
        check(ask(url, "again", seed=i, parallel_tool_calls=True, **options), ["now", "fixed"])
        for i, url in enumerate(urls)
    ]
    assert any(len(calls) > 1 for calls in several)
