"""Bodies with millions of mistakes: one error, in little time."""

import json

import httpx
import pytest
from pydantic import ValidationError

from quatom.serving.api_errors import MAX_ERRORS, from_validation
from quatom.serving.chat_protocol import ChatCompletionRequest, DetokenizeRequest, TokenizeRequest
from quatom.serving.embeddings import EmbeddingRequest
from quatom.serving.protocol import CompletionRequest
from quatom.serving.responses_protocol import ResponsesRequest

REQUESTS = (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    ResponsesRequest,
    TokenizeRequest,
)


def lists_in(schema):
    """Every list in a core schema of pydantic."""
    if isinstance(schema, dict):
        if schema.get("type") == "list":
            yield schema
        schema = list(schema.values())
    if isinstance(schema, list | tuple):
        for part in schema:
            yield from lists_in(part)


@pytest.mark.parametrize("request_model", REQUESTS)
def test_the_first_wrong_item_ends_the_check_of_a_list(request_model):
    found = list(lists_in(request_model.__pydantic_core_schema__))
    assert found
    assert all(schema.get("fail_fast") for schema in found)


@pytest.mark.parametrize(
    ("request_model", "body"),
    [
        (CompletionRequest, {"prompt": ["a", *[1] * 50_000]}),
        (CompletionRequest, {"prompt": [["a"]] * 50_000}),
        (ChatCompletionRequest, {"messages": [1] * 50_000}),
        (DetokenizeRequest, {"tokens": [-1] * 50_000}),
    ],
)
def test_mistakes_in_lists_are_few(request_model, body):
    with pytest.raises(ValidationError) as raised:
        request_model.model_validate_json(json.dumps(body))
    assert raised.value.error_count() < 10  # at most one for each type that the field may have


def test_many_unknown_fields_are_counted():
    fields = {f"x{i}": 1 for i in range(MAX_ERRORS + 1)}
    with pytest.raises(ValidationError) as raised:
        CompletionRequest.model_validate_json(json.dumps({"prompt": "a", **fields}))
    assert from_validation(raised.value).message == "the body has 1001 wrong or unknown fields"


def test_the_error_is_that_of_the_closest_type(server):
    image = {"type": "image_url", "image_url": {"url": "http://localhost/x.png"}}
    for messages, what in (
        ([{"role": "user", "content": [image]}], "Input should be 'text' or 'refusal'"),
        ([{"role": "user", "content": 5}], "Input should be a valid string"),
    ):
        body = {"messages": messages}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body)
        assert answer.status_code == 400
        assert what in answer.json()["error"]["message"]


def test_too_many_prompts_are_too_many(server):
    answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": ["a"] * 3000})
    assert "at most 2048 items" in answer.json()["error"]["message"]
