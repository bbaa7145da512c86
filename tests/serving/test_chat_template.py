"""From messages to the prompt: what a template is given, and what it must not leave out."""

import json

import pytest

from quatom.errors import RequestError
from quatom.serving.api_errors import ApiError
from quatom.serving.chat_protocol import ChatCompletionRequest
from quatom.serving.chat_template import read_chat_template
from quatom.serving.prompt import PromptEncoder, turn_of
from tests.serving.scripted import scripted_tokenizer
from tests.serving.templates import HERMES, LLAMA, MISTRAL, OPENED, PHI, TEMPLATES

PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
USER = {"role": "user", "content": "hi"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]


def call(arguments, call_id="abcdefghi"):
    function = {"name": "get_weather", "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}


def asked(arguments='{"city": "Zürich"}', content=None):
    return {"role": "assistant", "content": content, "tool_calls": [call(arguments)]}


RESULT = {"role": "tool", "tool_call_id": "abcdefghi", "name": "get_weather", "content": "12 °C"}


def prompt(template, messages, **options):
    """What the model would be given."""
    body = ChatCompletionRequest.model_validate_json(json.dumps({"messages": messages, **options}))
    encoder = PromptEncoder(scripted_tokenizer(template))
    return encoder.dialogue.prompt(turn_of(body.messages, body, None, body.reasoning_effort))


def refusal(template, messages, **options):
    with pytest.raises(ApiError) as caught:
        prompt(template, messages, **options)
    assert caught.value.status == 400
    assert "\n" not in caught.value.message
    return caught.value.message


@pytest.mark.parametrize("arguments", ['{"city": "Zürich"}', {"city": "Zürich"}])
def test_arguments_reach_the_template_as_an_object(arguments):
    template = (
        "{{ messages[0].content }}{{ messages[1].tool_calls[0].function.name }}"
        "{% for k, v in messages[1].tool_calls[0].function.arguments.items() %}{{ k }}={{ v }}"
        "{% endfor %}"
    )
    assert prompt(template, [USER, asked(arguments)]) == "higet_weathercity=Zürich"


@pytest.mark.parametrize("arguments", ["", None, "{}", "null"])
def test_no_arguments_are_an_empty_object(arguments):
    template = (
        "{{ messages[0].content }}{{ messages[1].tool_calls[0].function.name }}"
        "{{ messages[1].tool_calls[0].function.arguments | tojson }}"
    )
    assert prompt(template, [USER, asked(arguments)]) == "higet_weather{}"


@pytest.mark.parametrize("arguments", ['{"city": Zürich}', "[" * 100_000])
def test_arguments_that_are_no_json_are_shown_as_they_were(arguments):
    text = prompt(HERMES, [USER, asked(arguments)])
    assert json.dumps(arguments, ensure_ascii=False) in text


def test_no_tool_calls_are_no_tool_calls():
    template = (
        PLAIN + "{% for m in messages %}{% if 'tool_calls' in m %}CALLS{% endif %}{% endfor %}"
    )
    answer = {"role": "assistant", "content": "a", "tool_calls": []}
    assert prompt(template, [USER, answer]) == "[user]hi[assistant]a"
    assert prompt(template, [USER, {**answer, "tool_calls": None}]) == "[user]hi[assistant]a"


def test_names_and_ids_pass_through():
    template = PLAIN + "{% for m in messages %}<{{ m.name }},{{ m.tool_call_id }}>{% endfor %}"
    text = prompt(template, [{**USER, "name": "ann"}, RESULT])
    assert text.endswith("<ann,><get_weather,abcdefghi>")


def test_content_parts_are_joined():
    parts = [{"type": "text", "text": t} for t in ("a", "b\n", "c")]
    assert prompt(PLAIN, [{"role": "user", "content": parts}]) == "[user]ab\nc"


@pytest.mark.parametrize(
    ("template", "role"),
    [
        (PLAIN, "system"),
        (PLAIN + "{% if messages[0].role == 'developer' %}{% endif %}", "developer"),
    ],
)
def test_developer_is_system_where_the_template_does_not_know_it(template, role):
    messages = [{"role": "developer", "content": "Be brief."}, USER]
    assert prompt(template, messages).startswith(f"[{role}]Be brief.")


def test_reasoning_comes_back_in_under_both_names():
    template = PLAIN + "{{ messages[1].reasoning_content }}"
    for name in ("reasoning_content", "reasoning"):
        answer = {"role": "assistant", "content": "a", name: "because"}
        assert prompt(template, [USER, answer]) == "[user]hi[assistant]abecause"


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_format_is_told_of_tools_calls_and_results(name):
    text = prompt(TEMPLATES[name], [USER, asked(), RESULT, USER], tools=TOOLS)
    assert "get_weather" in text
    assert "Zürich" in text
    assert "12 °C" in text


def test_phi_has_tools_in_its_system_message():
    alone = prompt(PHI, [USER], tools=TOOLS)
    assert alone.startswith('<|system|><|tool|>[{"name": "get_weather"')
    with_system = prompt(PHI, [{"role": "system", "content": "Be brief."}, USER], tools=TOOLS)
    assert with_system.startswith('<|system|>Be brief.<|tool|>[{"name": "get_weather"')
    assert "<|tool|>" not in prompt(PHI, [USER])


ONLY_USER = (
    "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "messages", "options", "what"),
    [
        (ONLY_USER, [{"role": "system", "content": "hi"}, USER], {}, "message 0 (role 'system')"),
        (ONLY_USER, [{"role": "developer", "content": "x"}, USER], {}, "message 0 (role 'system')"),
        (ONLY_USER, [USER, {"role": "assistant", "content": "a"}, USER], {}, "message 1"),
        (ONLY_USER, [USER, RESULT], {}, "message 1 (role 'tool')"),
        (PLAIN, [USER, asked(), RESULT], {}, "the tool calls of message 1"),
        (PLAIN, [USER], {"tools": TOOLS}, "tools"),
        (OPENED, [USER], {"tools": TOOLS}, "tools"),
        ("{{ messages[-1].content }}", [USER, USER], {}, "message 0 (role 'user')"),
        ("constant", [USER], {}, "message 0"),
        # Names without arguments would show a call that was never made.
        (
            PLAIN + "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.name }}"
            "{% endfor %}{% endfor %}",
            [USER, asked()],
            {},
            "the arguments of tool calls in message 1",
        ),
    ],
)
def test_nothing_is_left_out_silently(template, messages, options, what):
    assert f"leaves out {what}" in refusal(template, messages, **options)


def test_what_is_said_elsewhere_too_is_still_missed():
    """`hi` stands in the user's message, so that looking for it in the prompt finds it."""
    messages = [{"role": "system", "content": "hi"}, USER]
    assert "leaves out message 0" in refusal(ONLY_USER, messages)


def test_templates_may_change_what_they_say():
    trimmed = "{% for m in messages %}{{ m.content | trim | tojson }}{% endfor %}"
    assert prompt(trimmed, [{"role": "user", "content": ' a"b '}]) == '"a\\"b"'
    # Earlier reasoning is dropped by design, and empty messages say nothing.
    old = {"role": "assistant", "content": "<think>long</think>short"}
    assert "long" not in prompt(OPENED, [USER, old, USER])
    assert prompt(ONLY_USER, [{"role": "system", "content": " \n"}, USER]) == "[hi]"


def test_a_template_that_looks_at_contents_is_not_refused():
    template = "{% if messages[0].content != 'hi' %}{{ raise_exception('say hi') }}{% endif %}ok"
    assert prompt(template, [USER]) == "ok"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must\nalternate') }}", "roles must"),
        ("{{ messages[7].content }}", "no element 7"),
        ("{{ 1 // 0 }}", "division"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{% for %}", "Expected an expression"),
        ("{{ messages | nosuchfilter }}", "nosuchfilter"),
        ("{{ 'x' * 10 ** 30 }}", ""),
        ("{{ messages[0].content.__class__.__mro__ }}", "unsafe"),
        ("{{ messages[0].content + 1 }}", ""),
        ("{% include 'x' %}", ""),
    ],
)
def test_any_exception_in_a_template_is_one_line(template, reason):
    message = refusal(template, [USER])
    assert message.startswith("the chat template refuses these messages: ")
    assert reason in message


def test_rules_of_a_template_are_passed_on():
    answer = asked()
    twice = {**answer, "tool_calls": answer["tool_calls"] * 2}
    assert "single tool-calls at once" in refusal(LLAMA, [USER, twice])
    wrong = {**answer, "tool_calls": [call("{}", call_id="call_1")]}
    assert "length 9" in refusal(MISTRAL, [USER, wrong])


def test_template_arguments():
    template = PLAIN + "{{ enable_thinking }}{{ reasoning_effort }}{{ other }}"
    text = prompt(
        template,
        [USER],
        chat_template_kwargs={"enable_thinking": False, "unknown": 1},
        reasoning_effort="low",
    )
    assert text == "[user]hiFalselow"
    assert "may not hold tools" in refusal(PLAIN, [USER], chat_template_kwargs={"tools": []})


def test_a_model_may_have_a_template_for_tools():
    tokenizer = scripted_tokenizer(None)
    tokenizer.chat_template = {"default": PLAIN, "tool_use": HERMES}
    encoder = PromptEncoder(tokenizer)
    assert encoder.dialogue.tool_format.name == "hermes"
    body = ChatCompletionRequest.model_validate({"messages": [USER], "tools": TOOLS})
    assert "# Tools" in encoder.dialogue.prompt(turn_of(body.messages, body))
    body = ChatCompletionRequest.model_validate({"messages": [USER]})
    assert encoder.dialogue.prompt(turn_of(body.messages, body)) == "[user]hi"


def test_template_files(tmp_path):
    path = tmp_path / "t.jinja"
    path.write_text(HERMES)
    assert read_chat_template(path) == HERMES
    path.write_text("{% generation %}{{ x | strftime_now }}{% break %}{% endgeneration %}")
    read_chat_template(path)
    path.write_text("{% for %}")
    with pytest.raises(RequestError, match=r"t\.jinja is no chat template: Expected"):
        read_chat_template(path)
    path.write_bytes(b"\xff")
    with pytest.raises(RequestError, match="cannot read the chat template"):
        read_chat_template(path)
    with pytest.raises(RequestError, match="cannot read the chat template"):
        read_chat_template(tmp_path / "none")
