"""Our responses against OpenAI's own OpenAPI document, and our server against our own."""

import json
from contextlib import suppress

import httpx
import pytest

from tests.conftest import SHARED_DATA

DOCUMENT = SHARED_DATA / "openai_openapi" / "openapi.json"


def without_nullable(schema):
    """OpenAPI 3.0's `nullable: true` as JSON Schema: anyOf with null."""
    if isinstance(schema, list):
        return [without_nullable(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {k: without_nullable(v) for k, v in schema.items() if k != "nullable"}
    return {"anyOf": [made, {"type": "null"}]} if schema.get("nullable") is True else made


@pytest.fixture(scope="module")
def validate():
    """A function (schema name, instance) that raises on the first error."""
    jsonschema = pytest.importorskip("jsonschema")
    if not DOCUMENT.exists():
        pytest.skip("OpenAI's OpenAPI document is not on this machine")
    components = without_nullable(json.loads(DOCUMENT.read_text())["components"])

    def check(name, instance):
        schema = {"$ref": f"#/components/schemas/{name}", "components": components}
        jsonschema.Draft202012Validator(schema).validate(instance)

    return check


def post(server, path, **body):
    response = httpx.post(f"{server.url}{path}", json={"model": "hash", "temperature": 0, **body})
    assert response.status_code == 200, response.text
    return response


def chunks(response):
    lines = [line[6:] for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    "options",
    [{}, {"n": 2, "logprobs": 3}, {"echo": True, "logprobs": 1}, {"logprobs": 0, "stop": ["x"]}],
)
def test_completions(server, validate, options):
    made = post(server, "/v1/completions", prompt="hello", max_tokens=5, **options)
    validate("CreateCompletionResponse", made.json())


@pytest.mark.parametrize("options", [{}, {"n": 2, "logprobs": True, "top_logprobs": 2}])
def test_chat_completions(server, validate, options):
    made = post(server, "/v1/chat/completions", messages=MESSAGES, max_tokens=5, **options)
    validate("CreateChatCompletionResponse", made.json())


@pytest.mark.parametrize("usage", [None, {"include_usage": True, "continuous_usage_stats": True}])
@pytest.mark.parametrize("logprobs", [False, True])
def test_chat_streams(server, validate, usage, logprobs):
    made = post(
        server,
        "/v1/chat/completions",
        messages=MESSAGES,
        max_tokens=5,
        stream=True,
        logprobs=logprobs,
        stream_options=usage,
    )
    for chunk in chunks(made):
        validate("CreateChatCompletionStreamResponse", chunk)


def test_completion_streams(server, validate):
    made = post(
        server,
        "/v1/completions",
        prompt="hello",
        max_tokens=5,
        stream=True,
        logprobs=1,
        stream_options={"include_usage": True},
    )
    for chunk in chunks(made):
        # The document has no schema for unfinished chunks; OpenAI's server sends null there, too.
        for choice in chunk["choices"]:
            choice["finish_reason"] = choice["finish_reason"] or "stop"
        validate("CreateCompletionResponse", chunk)


def test_models_and_errors(server, validate):
    validate("ListModelsResponse", httpx.get(f"{server.url}/v1/models").json())
    validate("Model", httpx.get(f"{server.url}/v1/models/hash").json())
    validate("ErrorResponse", httpx.get(f"{server.url}/v1/models/other").json())
    refused = httpx.post(f"{server.url}/v1/completions", json={})
    validate("ErrorResponse", refused.json())


def test_streams_are_documented(server):
    paths = httpx.get(f"{server.url}/openapi.json").json()["paths"]
    bodies = {"/v1/completions": {"prompt": "a"}, "/v1/chat/completions": {"messages": MESSAGES}}
    for path, body in bodies.items():
        content = paths[path]["post"]["responses"]["200"]["content"]
        assert content.keys() == {"application/json", "text/event-stream"}
        assert (
            post(server, path, **body, max_tokens=1, stream=True)
            .headers["content-type"]
            .startswith("text/event-stream")
        )
    assert "text/event-stream" not in str(paths["/tokenize"])


def run_schemathesis(server, max_examples):
    """Requests that fit our own schema, and requests that do not; returns how many were sent."""
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis.errors import Unsatisfiable
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    count = 0

    def check(case):
        nonlocal count
        count += 1
        if isinstance(case.body, dict) and "max_tokens" in case.body:
            wanted = case.body["max_tokens"]
            # Short answers: the surface is what is tested. What is wrong must stay wrong.
            if wanted is None or (type(wanted) is int and wanted > 2):
                case.body["max_tokens"] = 2
        # Rules that a schema cannot say (ids of the vocabulary, valid grammars) refuse some data
        # that fits it; everything else is judged.
        case.call_and_validate(timeout=30, excluded_checks=[positive_data_acceptance])

    options = settings(
        max_examples=max_examples,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        database=None,
    )
    for operation in schemathesis.openapi.from_url(
        f"{server.url}/openapi.json"
    ).get_all_operations():
        for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):
            strategy = operation.ok().as_strategy(generation_mode=mode)
            with suppress(Unsatisfiable):  # nothing can be wrong about a route without input
                options(given(case=strategy)(check))()
    return count


def test_schemathesis_finds_nothing(server):
    assert run_schemathesis(server, max_examples=3) > 30
    assert httpx.get(f"{server.url}/health").status_code == 200


@pytest.mark.slow
def test_schemathesis_finds_nothing_in_many_requests(server):
    assert run_schemathesis(server, max_examples=300) > 2000
    assert httpx.get(f"{server.url}/health").status_code == 200
