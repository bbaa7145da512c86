"""/v1/responses, judged by the openai client."""

import json

import httpx
import openai
import pytest
from pydantic import BaseModel

from tests.serving.scripted import scripted_server
from tests.serving.templates import QWEN3

TOOL = {
    "type": "function",
    "name": "get_weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Bern", "Zürich"]}},
        "required": ["city"],
    },
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bern"}}\n</tool_call>'


NO_THINKING = {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}


def answer(prompt):
    if "12 °C" in prompt:
        return "It is cold."
    return prompt.rpartition("say:")[2].partition("<assistant>")[0]


@pytest.fixture(scope="module")
def server():
    with scripted_server(QWEN3, answer) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def ask(client, given, **options):
    options = {"temperature": 0, "max_output_tokens": 300, **options}
    return client.responses.create(model="hash", input=given, **options)


def test_text(client):
    made = ask(client, "say:Hello.", store=True, metadata={"a": "b"})
    assert made.object == "response"
    assert made.id.startswith("resp")
    assert made.status == "completed"
    assert made.output_text == "Hello."
    assert made.output[0].type == "message"
    assert made.store is False  # nothing is kept, whatever was asked
    assert made.metadata == {"a": "b"}
    assert made.usage.output_tokens == 7
    assert made.usage.total_tokens == made.usage.input_tokens + 7
    assert made.usage.output_tokens_details.reasoning_tokens == 0


def test_instructions_and_items(client, server):
    parts = [{"type": "input_text", "text": "say:"}, {"type": "input_text", "text": "Hi."}]
    items = [
        {"role": "developer", "content": "Be kind."},
        {"type": "message", "role": "user", "content": "first"},
        {
            "type": "message",
            "id": "msg_1",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "second", "annotations": []}],
        },
        {"role": "user", "content": parts},
    ]
    made = ask(client, items, instructions="Be brief.")
    assert made.output_text == "Hi."
    assert made.instructions == "Be brief."
    prompt = server.model.prompts[-1]
    assert prompt.startswith("<user>system: Be brief.\n\nBe kind.<user>user: first")
    assert "<user>assistant: second" in prompt


def test_an_agent_loop_of_two_calls(client, server):
    items = [{"role": "user", "content": f"say:<think>\nI call.\n</think>\n\n{CALL}"}]
    first = ask(client, items, tools=[TOOL])
    reasoning, call = first.output
    assert (reasoning.type, reasoning.content[0].text) == ("reasoning", "I call.")
    assert first.usage.output_tokens_details.reasoning_tokens == 7
    assert (call.type, call.name, json.loads(call.arguments)) == (
        "function_call",
        "get_weather",
        {"city": "Bern"},
    )
    items += [item.model_dump(exclude_none=True) for item in first.output]
    items.append({"type": "function_call_output", "call_id": call.call_id, "output": "12 °C"})
    second = ask(client, items, tools=[TOOL])
    assert second.output_text == "It is cold."
    assert '<tool_call>\n{"name": "get_weather"' in server.model.prompts[-1]


def test_choices(client):
    named = {"type": "function", "name": "get_weather"}
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [named]}
    for choice in ("required", named, allowed):
        made = ask(client, "say:No.", tools=[TOOL], tool_choice=choice, **NO_THINKING)
        assert json.loads(made.output[0].arguments)["city"] in ("Bern", "Zürich")
    made = ask(client, f"say:{CALL}", tools=[TOOL], tool_choice="none")
    assert made.output_text == CALL
    assert ask(client, "say:No.", tools=[TOOL]).output_text == "No."


class Weather(BaseModel):
    city: str
    degrees: int


def test_text_formats(client):
    text = '{"city": "Bern", "degrees": 12}'
    made = client.responses.parse(
        model="hash", input=f"say:{text}", text_format=Weather, temperature=0
    )
    assert made.output_parsed == Weather(city="Bern", degrees=12)
    with client.responses.stream(
        model="hash", input=f"say:{text}", text_format=Weather, temperature=0
    ) as stream:
        events = list(stream)
        assert stream.get_final_response().output_parsed.degrees == 12
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == text
    made = ask(client, "say:no JSON", text={"format": {"type": "json_object"}}, **NO_THINKING)
    assert isinstance(json.loads(made.output_text), dict)


TEXT = f"<think>\nI call.\n</think>\n\nI look.\n{CALL}\n{CALL}"


def test_streamed_events_build_the_response(client):
    events = list(ask(client, f"say:{TEXT}", tools=[TOOL], stream=True))
    assert [e.sequence_number for e in events] == list(range(len(events)))
    kinds = [e.type.removeprefix("response.") for e in events]
    assert kinds[:2] == ["created", "in_progress"]
    assert kinds[-1] == "completed"
    once = [k for i, k in enumerate(kinds) if k != kinds[i - 1]][2:-1]
    text = ["content_part.added", "{0}.delta", "{0}.done", "content_part.done"]
    call = [f"function_call_arguments.{kind}" for kind in ("delta", "done")]
    begun, ended = ["output_item.added"], ["output_item.done"]
    assert once == [
        *begun,
        *(k.format("reasoning_text") for k in text),
        *ended,
        *begun,
        *(k.format("output_text") for k in text),
        *ended,
        *(begun + call + ended) * 2,
    ]
    made: dict = {}
    for event in events:
        if event.type == "response.output_item.added":
            assert event.item.status == "in_progress"
            assert not getattr(event.item, "content", None)
            assert not getattr(event.item, "arguments", None)
            made[event.item.id] = ""
        elif event.type.endswith(".delta"):
            made[event.item_id] += event.delta
        elif event.type == "response.output_item.done":
            item = event.item
            assert item.status == "completed"
            whole = item.arguments if item.type == "function_call" else item.content[0].text
            assert made[item.id] == whole
    final = events[-1].response
    assert [item.id for item in final.output] == list(made)
    assert final.usage.output_tokens > 0
    assert events[0].response.usage is None
    assert events[0].response.output == []


def test_stream_helper_and_whole_answer_agree(client):
    whole = ask(client, f"say:{TEXT}", tools=[TOOL])
    with client.responses.stream(
        model="hash",
        input=f"say:{TEXT}",
        tools=[{**TOOL, "strict": False}],
        temperature=0,
        max_output_tokens=300,
    ) as stream:
        streamed = stream.get_final_response()
    assert [i.type for i in whole.output] == ["reasoning", "message", *["function_call"] * 2]
    for a, b in zip(whole.output, streamed.output, strict=True):
        assert a.type == b.type
        assert getattr(a, "content", None) == getattr(b, "content", None) or (
            a.content[0].text == b.content[0].text
        )
        assert getattr(a, "arguments", None) == getattr(b, "arguments", None)
    assert whole.usage == streamed.usage


def test_an_answer_that_is_cut_off(client):
    made = ask(client, "say:Hello.", max_output_tokens=4)
    assert (made.status, made.output_text) == ("incomplete", "Hell")
    assert made.incomplete_details.reason == "max_output_tokens"
    assert made.output[0].status == "incomplete"
    *_, last = ask(client, "say:Hello.", max_output_tokens=4, stream=True)
    assert last.type == "response.incomplete"
    assert last.response.output[0].status == "incomplete"


def test_an_empty_answer_is_an_empty_message(client):
    made = ask(client, "say:")
    assert made.output_text == ""
    assert made.output[0].content[0].text == ""


def test_events_are_named_for_other_clients(server):
    body = {"model": "hash", "input": "say:Hi.", "stream": True, "temperature": 0}
    text = httpx.post(f"{server.url}/v1/responses", json=body).text
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        assert name == f"event: {json.loads(data.removeprefix('data: '))['type']}"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id is not supported"),
        ({"conversation": "conv_1"}, "conversation is not supported"),
        ({"background": True}, "background is not supported"),
        ({"prompt": {"id": "p"}}, "prompt is not supported"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"top_logprobs": 3}, "top_logprobs is not supported"),
        ({"n": 2}, "n must be 1"),
        ({"response_format": {"type": "json_object"}}, "text.format"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tool_choice": "required"}, "tool_choice needs tools"),
        ({"tools": [TOOL, TOOL]}, "two tools are named"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "item_reference"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input"),
        ({"messages": []}, "messages"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "schema"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(client, options, match):
    with pytest.raises(openai.BadRequestError, match=match):
        ask(client, "say:x", extra_body=options)


def test_what_asks_for_nothing_is_accepted(client):
    made = ask(
        client,
        "say:Hi.",
        include=["reasoning.encrypted_content"],
        truncation="disabled",
        reasoning={"effort": "low", "summary": "auto"},
        parallel_tool_calls=True,
        top_p=1,
        extra_body={"previous_response_id": None, "background": False, "conversation": None},
    )
    assert made.output_text == "Hi."
    assert made.reasoning.effort == "low"


def test_an_engine_failure_is_a_failed_response():
    def fail(prompt):
        raise RuntimeError("broken")

    with scripted_server(QWEN3, fail) as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
            with pytest.raises(openai.InternalServerError):
                ask(client, "hi")
            *_, last = ask(client, "hi", stream=True)
        assert last.type == "response.failed"
        assert last.response.status == "failed"
        assert "broken" in last.response.error.message
