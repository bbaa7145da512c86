"""No field of a request is taken and then ignored: carried out, harmless, or refused by name."""

import json

import httpx
import pytest

from quatom.serving.chat_protocol import ChatCompletionRequest
from quatom.serving.protocol import CompletionRequest
from tests.conftest import SHARED_DATA

DOCUMENT = SHARED_DATA / "openai_openapi" / "openapi.json"
PROMPTS = {
    "/v1/completions": {"prompt": "hi"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
}
BOTH = tuple(PROMPTS)
CHAT = (BOTH[1],)


def post(server, path, **fields):
    body = {**PROMPTS[path], "max_tokens": 2, **fields}
    return httpx.post(server.url + path, json=body, timeout=60)


REFUSED = [
    (BOTH, "use_beam_search", True),
    (BOTH, "length_penalty", 0.5),
    (BOTH, "early_stopping", True),
    (BOTH, "prompt_logprobs", 1),
    (BOTH, "allowed_token_ids", [1]),
    (BOTH, "truncate_prompt_tokens", 3),
    (BOTH, "logits_processors", ["x"]),
    (BOTH, "spaces_between_special_tokens", False),
    (BOTH, "return_tokens_as_token_ids", True),
    (BOTH, "priority", 3),
    (BOTH, "cache_salt", "x"),
    (BOTH, "vllm_xargs", {"a": 1}),
    (BOTH, "guided_whitespace_pattern", " "),
    (BOTH, "made_up", 1),
    (BOTH, "num_beams", 4),
    (BOTH, "temprature", 0.1),
    (CHAT, "audio", {"voice": "a", "format": "wav"}),
    (CHAT, "modalities", ["text", "audio"]),
    (CHAT, "verbosity", "low"),
    (CHAT, "web_search_options", {}),
    (CHAT, "functions", [{"name": "f"}]),
    (CHAT, "function_call", "auto"),
    (CHAT, "chat_template", "x"),
    (CHAT, "documents", []),
    (CHAT, "echo", True),
    (CHAT, "include_reasoning", False),
]


@pytest.mark.parametrize(("paths", "name", "value"), REFUSED, ids=lambda value: str(value)[:20])
def test_a_field_that_is_not_carried_out_is_refused_by_name(server, paths, name, value):
    for path in paths:
        refused = post(server, path, **{name: value})
        assert refused.status_code == 400, (path, refused.text)
        assert name in refused.json()["error"]["message"]
        assert refused.json()["error"]["param"].split(".")[0] == name


@pytest.mark.parametrize(
    ("name", "value", "where"),
    [
        ("response_format", {"type": "json_object", "schema": {}}, "schema"),
        ("response_format", {"type": "json_schema"}, "json_schema"),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x"}}, "schema"),
        ("response_format", {"type": "json_schema", "json_schema": {"schema": {}, "x": 1}}, "x"),
        ("response_format", {"type": "text", "json_schema": {"schema": {}}}, "json_schema"),
        ("response_format", {"type": "structural_tag"}, "structures"),
        ("response_format", {"type": "xml"}, "type"),
        ("structured_outputs", {"xml": "x"}, "xml"),
        ("structured_outputs", {"whitespace_pattern": " "}, "whitespace_pattern"),
        (
            "structured_outputs",
            {"json": {}, "disable_additional_properties": True},
            "disable_additional_properties",
        ),
        ("stream_options", {"include_everything": True}, "include_everything"),
    ],
)
def test_fields_inside_of_others(server, name, value, where):
    for path in BOTH:
        refused = post(server, path, stream=name == "stream_options", **{name: value})
        assert refused.status_code == 400, refused.text
        assert where in refused.json()["error"]["message"]
        assert refused.json()["error"]["param"].startswith(name)


HARMLESS = {
    "user": "me",
    "metadata": {"a": "b"},
    "store": True,
    "service_tier": "auto",
    "safety_identifier": "x",
    "prompt_cache_key": "x",
    "request_id": "x",
    "guided_decoding_backend": "xgrammar",
    "use_beam_search": False,
    "length_penalty": 1,
    "priority": 0,
    "stream_options": None,
    "allowed_token_ids": None,
}


def test_harmless_fields_and_values_change_nothing(server):
    for path in BOTH:
        plain = post(server, path, temperature=0)
        given = post(server, path, temperature=0, **HARMLESS)
        assert given.status_code == 200, given.text
        assert given.json()["choices"] == plain.json()["choices"]
    chat = post(server, CHAT[0], modalities=["text"], verbosity="medium", prediction={"a": 1})
    assert chat.status_code == 200, chat.text


@pytest.mark.skipif(not DOCUMENT.exists(), reason="OpenAI's document is not on this machine")
@pytest.mark.parametrize(
    ("model", "name"),
    [
        (CompletionRequest, "CreateCompletionRequest"),
        (ChatCompletionRequest, "CreateChatCompletionRequest"),
    ],
)
def test_every_field_of_openai_is_known(model, name):
    schemas = json.loads(DOCUMENT.read_text())["components"]["schemas"]

    def fields(schema):
        target = schemas[schema["$ref"].split("/")[-1]] if "$ref" in schema else schema
        found = set(target.get("properties", ()))
        return found.union(*map(fields, target.get("allOf", ())))

    names = {field.alias or key for key, field in model.model_fields.items()}
    assert fields(schemas[name]) - names <= {"parallel_tool_calls", "reasoning_effort"}
