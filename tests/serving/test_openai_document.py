"""Answers with tools, reasoning, items and vectors against OpenAI's own OpenAPI document."""

import json

import httpx
import pytest

from tests.serving.scripted import scripted_server
from tests.serving.templates import QWEN3
from tests.serving.test_openapi import chunks, validate  # noqa: F401

TOOL = {
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
ANSWER = (
    "<think>\nI call.\n</think>\n\nI look.\n"
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bern"}}\n</tool_call>'
)


@pytest.fixture(scope="module")
def server():
    with scripted_server(QWEN3, ANSWER) as running:
        yield running


def post(server, path, **body):
    body = {"model": "hash", **body}
    response = httpx.post(f"{server.url}/v1{path}", json=body, timeout=30)
    assert response.status_code == 200, response.text
    return response


def chat(server, **options):
    tools = [{"type": "function", "function": TOOL}]
    messages = [{"role": "user", "content": "hi"}]
    return post(
        server, "/chat/completions", messages=messages, tools=tools, temperature=0, **options
    )


def test_calls(server, validate):  # noqa: F811
    made = chat(server).json()
    validate("CreateChatCompletionResponse", made)
    assert made["choices"][0]["finish_reason"] == "tool_calls"
    for chunk in chunks(chat(server, stream=True)):
        validate("CreateChatCompletionStreamResponse", chunk)


def respond(server, **options):
    tools = [{"type": "function", **TOOL}]
    return post(server, "/responses", input="hi", tools=tools, temperature=0, **options)


def test_responses(server, validate):  # noqa: F811
    made = respond(server).json()
    assert [item["type"] for item in made["output"]] == ["reasoning", "message", "function_call"]
    # The document asks for tools with every field of OpenAI's, ours are those of the request.
    validate("Response", {**made, "tools": []})
    for item in made["output"]:
        validate("OutputItem", item)


def test_response_events(server, validate):  # noqa: F811
    events = [
        json.loads(block.partition("data: ")[2])
        for block in respond(server, stream=True).text.strip().split("\n\n")
    ]
    for event in events:
        if "response" in event:
            event["response"]["tools"] = []
        validate("ResponseStreamEvent", event)


def test_embeddings(server, validate):  # noqa: F811
    validate("CreateEmbeddingResponse", post(server, "/embeddings", input=["a", "b"]).json())
