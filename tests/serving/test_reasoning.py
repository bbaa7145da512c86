"""Reasoning over HTTP: split off, streamed, fed back in, and beside tools and constraints."""

import json

import openai
import pytest

from quatom.errors import RequestError
from quatom.serving.prompt import PromptEncoder
from tests.serving.scripted import scripted_server, scripted_tokenizer
from tests.serving.templates import HARMONY, OPENED, QWEN3, SPECIAL

USER = [{"role": "user", "content": "hi"}]
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["n"],
    "additionalProperties": False,
}
JSON = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
NOW = {"type": "function", "function": {"name": "now"}}
THOUGHT = "<think>\nThe user says hi.\n</think>\n\n"


def ask(server, **options):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        options = {"messages": USER, "temperature": 0, "max_tokens": 300, **options}
        if options.get("stream"):
            return list(client.chat.completions.create(model="hash", **options))
        return client.chat.completions.create(model="hash", **options).choices[0]


def streamed(server, **options):
    """Reasoning and content that a stream's deltas make."""
    reasoning, content = "", ""
    for chunk in ask(server, stream=True, **options):
        delta = chunk.choices[0].delta
        assert not (content and getattr(delta, "reasoning_content", None))
        reasoning += getattr(delta, "reasoning_content", None) or ""
        content += delta.content or ""
    return reasoning, content


@pytest.fixture(scope="module")
def qwen3():
    """Thinks unless the prompt says that it shall not."""

    def answer(prompt):
        # What the prompt writes after <assistant> is part of the script.
        return ("<think>\n\n</think>\n\n" if "/no_think" in prompt else THOUGHT) + "Hello."

    with scripted_server(QWEN3, answer) as server:
        yield server


@pytest.fixture(scope="module")
def opened():
    """A model whose prompt opens the tag."""
    with scripted_server(OPENED, THOUGHT + "Hello.") as server:
        yield server


@pytest.mark.parametrize("name", ["qwen3", "opened"])
def test_reasoning_is_apart_from_the_answer(name, request):
    server = request.getfixturevalue(name)
    message = ask(server).message
    assert message.reasoning_content == "The user says hi."
    assert message.content == "Hello."
    assert streamed(server) == ("The user says hi.", "Hello.")


def test_template_arguments_switch_it_off(qwen3):
    off = {"extra_body": {"chat_template_kwargs": {"enable_thinking": False, "unknown": 1}}}
    choice = ask(qwen3, **off)
    assert choice.message.content == "Hello."
    assert not hasattr(choice.message, "reasoning_content")
    assert streamed(qwen3, **off) == ("", "Hello.")


def test_an_answer_that_is_cut_off_is_all_reasoning(opened):
    choice = ask(opened, max_tokens=4)
    assert (choice.message.reasoning_content, choice.message.content) == ("The", "")
    assert choice.finish_reason == "length"


def test_a_constraint_begins_after_the_reasoning(qwen3, opened):
    for server in (qwen3, opened):
        message = ask(server, response_format=JSON).message
        assert message.reasoning_content == "The user says hi."
        assert 1 <= json.loads(message.content)["n"] <= 9
    off = {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}
    message = ask(qwen3, response_format=JSON, **off).message
    assert 1 <= json.loads(message.content)["n"] <= 9
    for constraint in (
        {"regex": "[0-9]{3}"},
        {"choice": ["yes", "no"]},
        {"json_object": True},
        {"grammar": 'start: "yes" | "no"'},
        {
            "structural_tag": {
                "type": "structural_tag",
                "format": {"type": "const_string", "value": "yes"},
            }
        },
    ):
        message = ask(opened, extra_body={"structured_outputs": constraint}).message
        assert message.reasoning_content == "The user says hi."
        assert message.content[0] in "0123456789{yn"


@pytest.mark.parametrize("choice", ["required", NOW])
def test_a_required_call_follows_the_reasoning(qwen3, choice):
    message = ask(qwen3, tools=[NOW], tool_choice=choice).message
    assert message.reasoning_content == "The user says hi."
    assert [c.function.name for c in message.tool_calls] == ["now"]
    assert message.content is None


def test_a_call_in_the_reasoning_is_none(opened):
    call = '<tool_call>{"name": "now"}</tool_call>'
    with scripted_server(QWEN3, f"<think>I could say {call}.</think>{call}") as server:
        message = ask(server, tools=[NOW]).message
        assert message.reasoning_content == f"I could say {call}."
        assert len(message.tool_calls) == 1
        strict = {"type": "function", "function": {"name": "now", "strict": True}}
        message = ask(server, tools=[strict]).message
        assert message.reasoning_content == f"I could say {call}."
        assert len(message.tool_calls) == 1


def test_none_leaves_it_in_the_content():
    with scripted_server(QWEN3, THOUGHT + "Hello.", reasoning_format="none") as server:
        message = ask(server).message
        assert message.content == THOUGHT + "Hello."
        assert not hasattr(message, "reasoning_content")


def test_deepseek_expects_reasoning_whatever_the_template_says():
    plain = "{% for m in messages %}{{ m.content }}{% endfor %}<assistant>"
    answer = "The user says hi.</think>Hello."
    with scripted_server(plain, answer) as server:
        assert ask(server).message.content == answer
    with scripted_server(plain, answer, reasoning_format="deepseek") as server:
        assert streamed(server) == ("The user says hi.", "Hello.")


def test_tags_may_be_special_tokens():
    template = OPENED.replace("<think>\n", "").replace("</think>", "[/THINK]")
    answer = "[THINK]Hm.[/THINK]Hello."
    with scripted_server(template, answer, special=["[THINK]", "[/THINK]"]) as server:
        assert streamed(server) == ("Hm.", "Hello.")
        message = ask(server, response_format=JSON).message
        assert message.reasoning_content == "Hm."
        assert 1 <= json.loads(message.content)["n"] <= 9


def test_harmony_has_channels():
    answer = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Hello."
    with scripted_server(HARMONY, answer, special=SPECIAL["harmony"]) as server:
        assert streamed(server) == ("Hm.", "Hello.")
        message = ask(server, tools=[NOW], tool_choice="required").message
        assert message.tool_calls[0].function.name == "now"


def test_formats_have_names():
    with pytest.raises(RequestError, match="no reasoning format is named 'x'; there are auto"):
        PromptEncoder(scripted_tokenizer(None), reasoning_format="x")
