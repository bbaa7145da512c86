"""Tool calls over HTTP, judged by the openai client: every format, whole and streamed."""

import json

import httpx
import openai
import pytest
from pydantic import BaseModel

from quatom.serving.dialogue import DialogueStyle
from tests.serving.scripted import scripted_server
from tests.serving.templates import HERMES, LLAMA, MISTRAL, SPECIAL, TEMPLATES

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Bern", "Zürich"]}},
    "required": ["city"],
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now"}},
]
USER = [{"role": "user", "content": "Weather?"}]
CALL = '{"city": "Zürich"}'
ANSWERS = {
    "hermes": 'I look.\n<tool_call>\n{"name": "get_weather", "arguments": %s}\n</tool_call>' % CALL,
    "qwen-coder": "I look.\n<tool_call>\n<function=get_weather>\n<parameter=city>\nZürich\n"
    "</parameter>\n</function>\n</tool_call>",
    "llama": '<|python_tag|>{"name": "get_weather", "parameters": %s}' % CALL,
    "pythonic": '[get_weather(city="Zürich")]',
    "mistral": 'I look.[TOOL_CALLS][{"name": "get_weather", "arguments": %s}]' % CALL,
    "mistral-args": "I look.[TOOL_CALLS]get_weather[ARGS]%s" % CALL,
    "granite": '<|tool_call|>[{"name": "get_weather", "arguments": %s}]' % CALL,
    "phi": '<|tool_call|>[{"name": "get_weather", "arguments": %s}]<|/tool_call|>' % CALL,
    "phi-functools": 'functools[{"name": "get_weather", "arguments": %s}]' % CALL,
    "harmony": "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>%s"
    % CALL,
}


@pytest.fixture(scope="module", params=TEMPLATES)
def family(request):
    """A server of one format's model, which calls when it may: (format, client, server)."""
    name = request.param

    def answer(prompt):
        return "It is cold." if "12 °C" in prompt else ANSWERS[name]

    with (
        scripted_server(TEMPLATES[name], answer, special=SPECIAL.get(name, ())) as server,
        connect(server) as client,
    ):
        yield name, client, server


def connect(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def ask(client, **options):
    options = {"messages": USER, "tools": TOOLS, "temperature": 0, "max_tokens": 400, **options}
    return client.chat.completions.create(model="hash", **options)


def streamed(client, **options):
    """The message that a stream's deltas make, its finish reason and its chunks."""
    content, calls, reason, chunks = "", [], None, []
    for chunk in ask(client, stream=True, **options):
        (choice,) = chunk.choices
        chunks.append(choice)
        content += choice.delta.content or ""
        for call in choice.delta.tool_calls or ():
            if call.id is not None:
                assert call.type == "function"
                assert call.index == len(calls)
                calls.append([call.id, call.function.name, ""])
            calls[call.index][2] += call.function.arguments
        reason = choice.finish_reason or reason
    return content, calls, reason, chunks


def test_a_call(family):
    name, client, _ = family
    choice = ask(client).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == ("I look." if "I look." in ANSWERS[name] else None)
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name) == ("function", "get_weather")
    assert json.loads(call.function.arguments) == {"city": "Zürich"}
    content, calls, reason, chunks = streamed(client)
    assert (content or None, reason) == (choice.message.content, "tool_calls")
    assert [c[1:] for c in calls] == [["get_weather", call.function.arguments]]
    assert chunks[0].delta.role == "assistant"
    assert "<" not in content
    assert "[" not in content


def test_an_agent_loop_of_two_calls(family):
    name, client, server = family
    first = ask(client, parallel_tool_calls=True).choices[0].message
    assert len(first.tool_calls[0].id) == (9 if name.startswith("mistral") else 29)
    result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "12 °C"}
    second = ask(client, messages=[*USER, first.model_dump(exclude_none=True), result]).choices[0]
    assert (second.message.content, second.finish_reason) == ("It is cold.", "stop")
    assert second.message.tool_calls is None
    assert "Zürich" in server.model.prompts[-1]
    assert "12 °C" in server.model.prompts[-1]


def test_required_and_named_calls_fit_their_schema(family):
    """The model wants to say something else; the constraint decides."""
    name, client, _ = family
    named = {"type": "function", "function": {"name": "get_weather"}}
    for choice in ("required", named):
        for options in ({}, {"parallel_tool_calls": False}):
            made = ask(
                client,
                messages=[{"role": "user", "content": "12 °C"}],
                tool_choice=choice,
                max_tokens=300,
                seed=1,
                **options,
            ).choices[0]
            assert made.finish_reason == "tool_calls", made
            assert made.message.content is None
            for call in made.message.tool_calls:
                arguments = json.loads(call.function.arguments)
                if call.function.name == "get_weather":
                    assert arguments["city"] in ("Bern", "Zürich")
                else:
                    assert (call.function.name, arguments) == ("now", {})
            if choice == named:
                assert [c.function.name for c in made.message.tool_calls] == ["get_weather"]
            if options:
                assert len(made.message.tool_calls) == 1
    assert name


def test_strict_functions_are_enforced_where_calling_is_free(family):
    _, client, _ = family
    tools = [{"type": "function", "function": {**TOOLS[0]["function"], "strict": True}}]
    call = ask(client, tools=tools).choices[0].message.tool_calls[0]
    assert json.loads(call.function.arguments) == {"city": "Zürich"}
    said = ask(client, tools=tools, messages=[{"role": "user", "content": "12 °C"}]).choices[0]
    assert said.message.content == "It is cold."
    # A city that the enum does not have cannot be written.
    schema = {**WEATHER, "properties": {"city": {"type": "string", "enum": ["Bern"]}}}
    tools = [
        {
            "type": "function",
            "function": {"name": "get_weather", "parameters": schema, "strict": True},
        }
    ]
    call = ask(client, tools=tools).choices[0].message.tool_calls[0]
    assert json.loads(call.function.arguments) == {"city": "Bern"}


def test_none_shows_no_tools_and_finds_no_calls(family):
    name, client, server = family
    made = ask(client, tool_choice="none").choices[0]
    assert made.message.tool_calls is None
    assert "get_weather" not in server.model.prompts[-1]
    if name != "harmony":  # whose parser reads every message
        assert "get_weather" in made.message.content


@pytest.fixture(scope="module")
def hermes():
    """A model that writes what the user says after `say:`."""

    def answer(prompt):
        return prompt.rpartition("say:")[2].partition("<assistant>")[0]

    with scripted_server(HERMES, answer) as server, connect(server) as client:
        yield client


def say(text):
    return [{"role": "user", "content": f"say:{text}"}]


NOW = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'


def test_several_calls(hermes):
    text = f"{NOW}\n{ANSWERS['hermes'].removeprefix('I look.')}"
    made = ask(hermes, messages=say(text)).choices[0].message
    assert [c.function.name for c in made.tool_calls] == ["now", "get_weather"]
    assert made.tool_calls[0].id != made.tool_calls[1].id
    _, calls, _, _ = streamed(hermes, messages=say(text))
    assert [c[1:] for c in calls] == [["now", "{}"], ["get_weather", CALL]]
    made = ask(hermes, messages=say(text), parallel_tool_calls=False).choices[0].message
    assert [c.function.name for c in made.tool_calls] == ["now"]


def test_only_allowed_functions_are_called(hermes):
    allowed = {
        "type": "allowed_tools",
        "allowed_tools": {
            "mode": "auto",
            "tools": [{"type": "function", "function": {"name": "get_weather"}}],
        },
    }
    made = ask(hermes, messages=say(NOW), tool_choice=allowed).choices[0]
    assert (made.message.content, made.finish_reason) == (NOW, "stop")
    allowed["allowed_tools"]["mode"] = "required"
    made = ask(hermes, messages=say(NOW), tool_choice=allowed, max_tokens=200).choices[0]
    assert {c.function.name for c in made.message.tool_calls} == {"get_weather"}


def test_a_call_that_is_cut_off_keeps_what_was_written(hermes):
    text = ANSWERS["hermes"].removeprefix("I look.\n")
    made = ask(hermes, messages=say(text), max_tokens=len(text.encode()) - 20).choices[0]
    assert made.finish_reason == "length"
    assert made.message.tool_calls[0].function.arguments == CALL[:-6]
    _, calls, reason, _ = streamed(hermes, messages=say(text), max_tokens=len(text.encode()) - 20)
    assert (calls[0][2], reason) == (CALL[:-6], "length")


def test_what_only_looks_like_a_call_is_content(hermes):
    for text in ("Use <tool_call> tags.", '<tool_call>{"name": "other"}</tool_call>', "a <tool_c"):
        made = ask(hermes, messages=say(text)).choices[0]
        assert (made.message.content, made.finish_reason) == (text, "stop")
        content, calls, reason, _ = streamed(hermes, messages=say(text))
        assert (content, calls, reason) == (text, [], "stop")


def test_several_answers_are_read_apart(hermes):
    made = ask(hermes, messages=say(NOW), n=3, temperature=0.1, seed=1).choices
    assert [[c.function.name for c in m.message.tool_calls] for m in made] == [["now"]] * 3
    seen = [0, 0, 0]
    for chunk in ask(hermes, messages=say(NOW), n=3, temperature=0.1, seed=1, stream=True):
        for choice in chunk.choices:
            seen[choice.index] += len(choice.delta.tool_calls or ())
    assert seen == [2, 2, 2]


def test_logprobs_are_those_of_all_tokens(hermes):
    made = ask(hermes, messages=say(NOW), logprobs=True).choices[0]
    assert "".join(t.token for t in made.logprobs.content).startswith(NOW)
    _, _, _, chunks = streamed(hermes, messages=say(NOW), logprobs=True)
    tokens = [t.token for c in chunks if c.logprobs for t in c.logprobs.content]
    assert "".join(tokens).startswith(NOW)


def test_special_tokens_other_than_the_format_s_are_hidden():
    special = [*SPECIAL["mistral"], "<|other|>"]
    answer = 'I <|other|>look.[TOOL_CALLS][{"name": "now", "arguments": {}}]'
    with scripted_server(MISTRAL, answer, special=special) as server, connect(server) as client:
        made = ask(client).choices[0].message
        assert made.content == "I look."
        assert made.tool_calls[0].function.name == "now"
        shown = ask(client, extra_body={"skip_special_tokens": False}).choices[0].message
        assert shown.content.startswith("I <|other|>look.")
        # Without tools the markers mean nothing, and are hidden like all special tokens.
        plain = client.chat.completions.create(model="hash", messages=USER, temperature=0)
        assert plain.choices[0].message.content.startswith('I look.[{"name"')


class GetWeather(BaseModel):
    """Weather of a city."""

    city: str


class Report(BaseModel):
    text: str


def test_the_client_s_parse_helpers(hermes):
    tool = openai.pydantic_function_tool(GetWeather)
    text = '<tool_call>\n{"name": "GetWeather", "arguments": {"city": "Bern"}}\n</tool_call>'
    made = hermes.chat.completions.parse(
        model="hash", messages=say(text), tools=[tool], temperature=0
    )
    assert made.choices[0].message.tool_calls[0].function.parsed_arguments == GetWeather(
        city="Bern"
    )
    with hermes.chat.completions.stream(
        model="hash", messages=say(text), tools=[tool], temperature=0
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.delta" in kinds
    assert kinds.count("tool_calls.function.arguments.done") == 1
    assert final.choices[0].message.tool_calls[0].function.parsed_arguments.city == "Bern"
    # With a format for the content, the answer is a call or fits it.
    both = {"model": "hash", "tools": [tool], "response_format": Report, "temperature": 0}
    report = '{"text": "cold"}'
    made = hermes.chat.completions.parse(messages=say(report), **both).choices[0].message
    assert made.parsed == Report(text="cold")
    made = hermes.chat.completions.parse(messages=say(text), **both).choices[0].message
    assert made.tool_calls[0].function.parsed_arguments.city == "Bern"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"tools": TOOLS * 65}, "at most 128 tools"),
        ({"tools": TOOLS * 2}, "two tools are named 'get_weather'"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "1 to 64"),
        (
            {
                "tools": [
                    {"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}
                ]
            },
            "schema of an object",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"tool_choice": "maybe"}, "tool_choice"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "other"}}},
            "tool_choice names the function 'other'; the tools have get_weather, now",
        ),
        ({"tools": [], "tool_choice": "required"}, "tool_choice needs tools"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": "auto"}, "function_call"),
    ],
)
def test_bad_tools_are_refused(hermes, options, match):
    with pytest.raises(openai.BadRequestError, match=match):
        ask(hermes, extra_body=options)


def test_no_tools_are_no_tools(hermes):
    for options in ({"tools": []}, {"tools": None}, {"tools": [], "tool_choice": "auto"}):
        made = ask(hermes, messages=say(NOW), extra_body=options).choices[0].message
        assert made.content == NOW


def test_an_unknown_format_is_an_error_that_says_what_was_looked_for():
    template = HERMES.replace("tool_call>", "action>")
    with scripted_server(template, NOW) as server, connect(server) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            ask(client)
        for sign in ("<tool_call> (hermes)", "[TOOL_CALLS", "--tool-format", "tool_choice: none"):
            assert sign in str(caught.value).replace("\\", "")
        assert ask(client, tool_choice="none").choices[0].message.content == NOW
    style = DialogueStyle(tool_format="hermes")
    with scripted_server(template, NOW, dialogue=style) as server, connect(server) as client:
        assert ask(client).choices[0].message.tool_calls[0].function.name == "now"


def test_a_model_of_single_calls_makes_one_unless_asked_for_more():
    two = '{"name": "now", "parameters": {}}; {"name": "now", "parameters": {}}'
    with scripted_server(LLAMA, two) as server, connect(server) as client:
        assert len(ask(client).choices[0].message.tool_calls) == 1
        assert len(ask(client, parallel_tool_calls=True).choices[0].message.tool_calls) == 2


def test_tokenize_shows_the_prompt_with_tools(hermes):
    url = str(hermes.base_url).removesuffix("/v1/")
    body = {"messages": USER, "tools": TOOLS}
    with_tools = httpx.post(f"{url}/tokenize", json=body).json()["count"]
    assert with_tools > httpx.post(f"{url}/tokenize", json={"messages": USER}).json()["count"]
