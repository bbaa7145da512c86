"""Every format's parser: whole texts, and the same texts cut anywhere."""

import json
import random
import time

import pytest

from quatom.errors import RequestError
from quatom.serving.answer import Answer
from quatom.serving.reasoning import ReasoningTags, Start
from quatom.serving.tools.function import by_name, make_function
from quatom.serving.tools.partial_text import NotACallError
from quatom.serving.tools.python_arguments import read_arguments
from quatom.serving.tools.registry import FORMATS, detect, format_named
from tests.serving.templates import TEMPLATES

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "hourly": {"type": "boolean"},
    },
    "required": ["city"],
}
FUNCTIONS = by_name(
    [
        make_function("get_weather", WEATHER, None),
        make_function("add", {"properties": {"a": {"type": "number"}, "b": {}}}, None),
    ]
)
NESTED = '{"city": "a</tool_call>\\"]}{b", "x": [{"y": "[/"}]}'

# (format, text, content, calls)
CASES = [
    ("hermes", '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>', "", "add {'a': 1}"),
    (
        "hermes",
        'Let me see.\n\n<tool_call>\n{"name": "get_weather", "arguments": ' + NESTED + "}\n"
        '</tool_call>\n<tool_call>{"arguments": {"a": 1}, "name": "add"}</tool_call>\n',
        "Let me see.",
        ["get_weather", NESTED, "add", '{"a": 1}'],
    ),
    ("hermes", '<tool_call>{"name": "add", "arguments": {}}</tool_call> Done. ', "Done.", "add {}"),
    ("hermes", 'A <tool_call>{"name": "add", "arguments": {}}</tool_call> B', "A  B", "add {}"),
    ("hermes", '<tool_call>{"name": "add"}</tool_call>', "", "add {}"),
    ("hermes", '<tool_call>{"name": "add", "arguments": null}</tool_call>', "", "add {}"),
    ("hermes", '<tool_call>{"name": "add", "arguments": "{\\"a\\": 2}"}</tool_call>', "", "add {'a': 2}"),
    ("hermes", '<tool_call>{"name": "add", "arguments": " "}</tool_call>', "", "add {}"),
    ("hermes", '<tool_call>{"name": "add", "arguments": "{\\"a\\": x}"}</tool_call>', "", ["add", '{"a": x}']),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": 1}}}</tool_call>', "", "add {'a': 1}"),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": 1}', "", "add {'a': 1}"),
    ("hermes", '<tool_call>[{"name": "add", "arguments": {}}, {"name": "add"}]</tool_call>', "", "add {} add {}"),
    # Cut off: the arguments are what was written.
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": [1, "x', "", ["add", '{"a": [1, "x']),
    # No JSON: the arguments are what was written, as with OpenAI.
    (
        "hermes",
        '<tool_call>{"name": "add", "arguments": {"a": Paris}}</tool_call> ok',
        "ok",
        ["add", '{"a": Paris}}'],
    ),
    ("llama", '{"name": "add", "parameters": {"a": 1}}', "", "add {'a': 1}"),
    ("llama", '\n{"type": "function", "name": "add", "parameters": {}}', "", "add {}"),
    ("llama", '<|python_tag|>{"name": "add", "parameters": {"a": 1}}', "", "add {'a': 1}"),
    ("llama", '{"name": "add", "parameters": {}}; {"name": "get_weather", "parameters": {"city": "x"}}', "", "add {} get_weather {'city': 'x'}"),
    ("llama", '{"name": "add", "parameters": {}} and {"x": 1}', 'and {"x": 1}', "add {}"),
    ("pythonic", "[add(a=1, b='x, \"y)'), get_weather(city=\"Z\\u00fc\", hourly=True)]", "", 'add {"a": 1, "b": "x, \\"y)"} get_weather {"city": "Zü", "hourly": true}'),
    ("pythonic", '[add(1, b=[None, {"k": -2.5}])] done', "done", 'add {"a": 1, "b": [null, {"k": -2.5}]}'),
    ("pythonic", "<|python_start|>[add()]<|python_end|>", "", "add {}"),
    ("pythonic", '[get_weather(city="\\ud83d\\ude00 a\\/b")]', "", 'get_weather {"city": "😀 a/b"}'),
    (
        "qwen-coder",
        "I look.\n<tool_call>\n<function=get_weather>\n<parameter=city>\nline 1\nsays \"é\"\n"
        "</parameter>\n<parameter=days>\n3\n</parameter>\n<parameter=hourly>\nTrue\n</parameter>\n"
        "</function>\n</tool_call>\n<tool_call>\n<function=add>\n</function>\n</tool_call>",
        "I look.",
        'get_weather {"city": "line 1\\nsays \\"é\\"", "days": 3, "hourly": true} add {}',
    ),
    ("qwen-coder", "<function=add>\n<parameter=b>\nx\n</parameter>\n</function>", "", 'add {"b": "x"}'),
    ("qwen-coder", "<tool_call>\n<function=get_weather>\n<parameter=city>\nab", "", ["get_weather", '{"city": "ab']),
    ("mistral", '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}, {"name": "add", "arguments": {"a": 2}, "id": "123456789"}]', "", "add {'a': 1} add {'a': 2}"),
    ("mistral", '[TOOL_CALLS]add[ARGS]{"a": 1}[TOOL_CALLS]add[CALL_ID]x1[ARGS]{}', "", "add {'a': 1} add {}"),
    ("mistral-args", 'Well.[TOOL_CALLS]get_weather{"city": "[ARGS]"}', "Well.", "get_weather {'city': '[ARGS]'}"),
    ("granite", '<|tool_call|>[{"name": "add", "arguments": {"a": 1}}]', "", "add {'a': 1}"),
    ("granite", '<tool_call>[{"name": "add", "arguments": {}}]', "", "add {}"),
    ("phi", '<|tool_call|>[{"name": "add", "arguments": {}}]<|/tool_call|>', "", "add {}"),
    ("phi-functools", 'functools[{"name": "add", "arguments": {"a": 1}}]', "", "add {'a': 1}"),
    ("harmony", '<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 1}', "", "add {'a': 1}"),
    ("harmony", '<|channel|>commentary<|message|>I look.<|end|><|start|>assistant to=functions.add<|channel|>commentary json<|message|>{}<|call|>', "I look.", "add {}"),
    ("harmony", "<|channel|>final<|message|>Hello", "Hello", ""),
    ("harmony", "Hello", "Hello", ""),
]  # fmt: skip

# What looks like a call and is none stays content, every character of it.
CONTENT = [
    ("hermes", "Put calls in <tool_call> tags, like <tool_call>{}</tool_call>."),
    ("hermes", '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": 1, "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"arguments": {"a": 1}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "add", "arguments": [1]}</tool_call>'),
    ("hermes", '<tool_call>{"name": "add", "arguments": "[1]"}</tool_call>'),
    ("hermes", '<tool_call>{"arguments": "hello", "name": "add"}</tool_call>'),
    ("hermes", "<tool_call>{'name': 'add'}</tool_call>"),
    ("hermes", "<tool_call>\n"),
    ("hermes", "a < b <tool \n "),
    ("hermes", '{"name": "add", "arguments": {}}'),
    ("llama", '{"answer": {"name": "add"}}'),
    ("llama", 'Sure: {"name": "add", "parameters": {}}'),
    ("llama", "[1, 2] is a list"),
    ("llama", "<|python_tag|>print(1)"),
    ("pythonic", "[1, 2]"),
    ("pythonic", "[add(a=os.x)]"),
    ("pythonic", "[add(1, 2, 3)]"),
    ("pythonic", "[add(a=1, a=2)]"),
    ("pythonic", "[add(a=1e999)]"),
    ("pythonic", "[nope()]"),
    ("pythonic", "[add(a=1"),
    ("qwen-coder", "<tool_call>\n<function=nope>\n</function>\n</tool_call>"),
    ("mistral", "[TOOL_CALLS]nope[ARGS]{}"),
    ("mistral", "[TOOL_CALLS]add please"),
    ("granite", "<|tool_call|>none"),
    ("phi-functools", "import functools\nfunctools.reduce"),
]


def read_calls(calls):
    return " ".join(f"{c.name} {json.loads(c.arguments)}" for c in calls)


def parser_of(name):
    return format_named(name).parser(FUNCTIONS)


@pytest.mark.parametrize(("name", "text", "content", "calls"), CASES)
def test_calls(name, text, content, calls):
    parsed = parser_of(name).parse(text, final=True)
    assert parsed.content == content
    if isinstance(calls, list):
        assert [x for c in parsed.calls for x in (c.name, c.arguments)] == calls
    elif "{'" in calls or '"' not in calls:
        assert read_calls(parsed.calls) == calls
    else:
        assert " ".join(f"{c.name} {c.arguments}" for c in parsed.calls) == calls


@pytest.mark.parametrize(("name", "text"), CONTENT)
def test_what_is_no_call_is_content(name, text):
    parsed = parser_of(name).parse(text, final=True)
    assert (parsed.content, parsed.calls) == (text, [])


def stream(pieces, make_answer, reason="stop"):
    """What a client puts together of the deltas, and the answer."""
    answer = make_answer()
    content, reasoning, calls = "", "", []
    for i, piece in enumerate(pieces):
        delta = answer.add(piece, finish_reason=reason if i == len(pieces) - 1 else None)
        content += delta.content
        reasoning += delta.reasoning
        for call in delta.calls:
            if call.name is not None:
                assert call.index == len(calls)
                calls.append([call.name, ""])
            calls[call.index][1] += call.arguments
    assert content == answer.parsed.content
    assert reasoning == answer.parsed.reasoning
    assert calls == [[c.name, c.arguments] for c in answer.parsed.calls]
    return answer.parsed


def cuts(text, chance):
    positions = sorted(chance.sample(range(len(text) + 1), min(len(text), chance.randint(0, 6))))
    return [text[a:b] for a, b in zip([0, *positions], [*positions, len(text)], strict=True)]


@pytest.mark.parametrize(
    ("name", "text"), [case[:2] for case in CASES] + CONTENT, ids=lambda value: value[:40]
)
def test_streams_join_to_the_whole(name, text):
    def answer():
        return Answer(parser=parser_of(name), call_id=iter("abcdef").__next__)

    whole = parser_of(name).parse(text, final=True)
    assert stream(list(text), answer) == whole
    assert stream([*text, ""], answer) == whole
    chance = random.Random(0)
    for _ in range(20):
        assert stream(cuts(text, chance), answer) == whole


def test_a_half_written_call_is_never_content():
    for name, text, content, calls in CASES:
        if not calls or name == "harmony":
            continue
        parser = parser_of(name)
        for end in range(len(text)):
            shown = parser.parse(text[:end], final=False).content
            assert content.startswith(shown.rstrip()), (text[:end], shown)


def test_random_texts_of_pieces_of_the_formats_stream_exactly():
    """What models really write wrongly is a shuffle of what they should write."""
    chance = random.Random(1)
    for name in TEMPLATES:
        texts = [case[1] for case in CASES if case[0] == name]
        texts += [text for other, text in CONTENT if other == name]
        for _ in range(75):
            pieces = []
            for _ in range(chance.randint(1, 5)):
                text = chance.choice(texts)
                a, b = sorted(chance.choices(range(len(text) + 1), k=2))
                pieces.append(text[a:b])
            text = "".join(pieces)
            whole = parser_of(name).parse(text, final=True)

            def answer(name=name):
                return Answer(parser=parser_of(name), call_id=lambda: "x")

            assert stream(cuts(text, chance), answer) == whole, text
            assert stream(list(text), answer) == whole, text


@pytest.mark.parametrize("name", ["hermes", "llama", "mistral-args", "qwen-coder", "pythonic"])
@pytest.mark.parametrize("kind", ["arguments", "calls", "markers", "text"])
def test_time_grows_with_the_text_and_not_with_its_square(name, kind):
    """4,000 deltas of 8 characters; a reparse from the start would take a minute."""
    long = 'abc \\n\\" def ' * 2500 if kind == "arguments" else ""
    text = {
        "hermes": '<tool_call>{"name": "add", "arguments": {"b": "' + long + '"}}</tool_call>',
        "llama": '{"name": "add", "parameters": {"b": "' + long + '"}}',
        "mistral-args": '[TOOL_CALLS]add[ARGS]{"b": "' + long + '"}',
        "qwen-coder": f"<tool_call><function=add><parameter=b>{long}</parameter></function>",
        "pythonic": '[add(b="' + long + '")]',
    }[name]
    if kind == "markers":
        text = (format_named(name).parser.markers[0] + "x") * (32000 // 10)
    elif kind == "calls":
        text = {
            "hermes": "<tool_call>" + '{"name": "add", "arguments": {}}, ' * 1000,
            "llama": '{"name": "add", "parameters": {}}; ' * 1000,
            "mistral-args": "[TOOL_CALLS]add[ARGS]{}" * 1000,
            "qwen-coder": "<tool_call><function=add></function></tool_call>" * 750,
            "pythonic": "[" + "add(), " * 2500,
        }[name]
    elif kind == "text":
        text = "word [ { < " * 3000
    answer = Answer(parser=parser_of(name), call_id=lambda: "x")
    start = time.process_time()
    for i in range(0, len(text), 8):
        answer.add(text[i : i + 8])
    assert time.process_time() - start < 5  # it takes 0.1 to 1 s


@pytest.mark.parametrize(
    "text", ['{"a":' * 5000, "[" * 5000, '{"name": "add", "parameters": ' * 500]
)
def test_deep_nesting_is_harmless(text):
    for name in ("llama", "pythonic", "hermes"):
        marker = "<tool_call>" if name == "hermes" else ""
        stream([marker + text, ""], lambda name=name: Answer(parser=parser_of(name), call_id=str))


def test_parallel_calls_may_be_dropped():
    text = '<tool_call>{"name": "add"}</tool_call><tool_call>{"name": "add"}</tool_call>'
    answer = Answer(parser=parser_of("hermes"), call_id=lambda: "x", parallel=False)
    answer.add(text, finish_reason="stop")
    assert len(answer.parsed.calls) == 1


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_shows_its_format(name):
    assert detect(TEMPLATES[name]).name == name


def test_formats_that_look_alike_are_told_apart():
    assert {f.name for f in FORMATS} == TEMPLATES.keys()
    assert detect("{% for m in messages %}{{ m.content }}{% endfor %}") is None
    with pytest.raises(RequestError, match="no tool format is named 'x'; there are harmony"):
        format_named("x")


THINK = ReasoningTags("<think>", "</think>")


@pytest.mark.parametrize(
    ("start", "text", "reasoning", "rest"),
    [
        (Start.MAYBE, "<think>\nHm, <b>.\n</think>\n\nYes.", "Hm, <b>.", "Yes."),
        (Start.MAYBE, "\n<think></think>Yes. ", "", "Yes. "),
        (Start.MAYBE, "Yes </think> no", "", "Yes </think> no"),
        (Start.MAYBE, " <thin", "", " <thin"),
        (Start.OPEN, "Hm.\n</think>\n\nYes.", "Hm.", "Yes."),
        (Start.OPEN, "<think>Hm.</think>Yes.", "Hm.", "Yes."),
        (Start.OPEN, "Hm. </thi", "Hm. </thi", ""),
        (Start.CLOSED, "Yes </think> no", "", "Yes </think> no"),
        (Start.OPEN, 'a <tool_call>{"name": "add"}</tool_call> b</think>c', None, "c"),
    ],
)
def test_reasoning_is_split_off_however_it_is_cut(start, text, reasoning, rest):
    def answer():
        parser = parser_of("hermes")
        return Answer(reasoning=THINK, start=start, parser=parser, call_id=lambda: "x")

    parsed = stream([text], answer)
    assert parsed.content == rest
    assert parsed.calls == []
    if reasoning is not None:
        assert parsed.reasoning == reasoning
    assert stream(list(text), answer) == parsed
    assert stream([*text, ""], answer) == parsed


def test_reasoning_then_a_call():
    text = (
        '<think>\nI call.\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>'
    )
    for pieces in ([text], list(text)):
        parsed = stream(
            pieces,
            lambda: Answer(
                reasoning=THINK, start=Start.MAYBE, parser=parser_of("hermes"), call_id=str
            ),
        )
        assert (parsed.reasoning, parsed.content) == ("I call.", "")
        assert [c.name for c in parsed.calls] == ["add"]


@pytest.mark.parametrize(
    ("prompt", "continued", "start"),
    [
        ("<assistant>", None, Start.MAYBE),
        ("<assistant><think>\n", None, Start.OPEN),
        ("<assistant><think>\n\n</think>\n\n", None, Start.CLOSED),
        ("<user>say <think>\n<assistant>", None, Start.MAYBE),
        ("... <think> so", "<think> so", Start.OPEN),
        ("... yes", "<think>a</think>yes", Start.CLOSED),
    ],
)
def test_the_prompt_says_whether_reasoning_has_begun(prompt, continued, start):
    assert THINK.start(prompt, continued) is start


@pytest.mark.parametrize(
    ("name", "parameters", "match"),
    [
        ("", None, "1 to 64"),
        ("a b", None, "1 to 64"),
        ("x" * 65, None, "1 to 64"),
        ("f", {"type": "array"}, "schema of an object"),
        ("f", {"properties": []}, "must be an object"),
    ],
)
def test_functions_are_checked(name, parameters, match):
    with pytest.raises(RequestError, match=match):
        make_function(name, parameters, None)


def test_functions_have_names_of_their_own():
    with pytest.raises(RequestError, match="two tools are named 'f'"):
        by_name([make_function("f", None, None)] * 2)


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("", []),
        ("1", [(None, 1)]),
        ("a=1, b='x'", [("a", 1), ("b", "x")]),
        ("a = [1, -2.5, (True, None,),], b={'k': {\"l\": false}}", [("a", [1, -2.5, [True, None]]), ("b", {"k": {"l": False}})]),
        ("0x1F, 1_000, 1e-3, .5, +2", [(None, x) for x in (31, 1000, 0.001, 0.5, 2)]),
        (r"'it\'s \"q\" \n\x41\u00fc\ud83d\ude00\/\d'", [(None, 'it\'s "q" \nAü😀/\\d')]),
        ("'a,b=(c', x=\")]\"", [(None, "a,b=(c"), ("x", ")]")]),
    ],
)  # fmt: skip
def test_python_arguments(text, arguments):
    assert read_arguments(text) == arguments


@pytest.mark.parametrize(
    "text",
    ["a", "a=", "a=b", "a=1 2", "f(1)", "a=f(1)", "*x", ",", "1,,2", "a=1e999", "a=1j", "a=b'x'",
     "a={1: 2}", "a={1}", "a=[", "a=]", "'", "a=\"\\U00110000\"", "a=" + "[" * 9999 + "]" * 9999],
)  # fmt: skip
def test_what_is_no_literal_is_no_argument(text):
    with pytest.raises(NotACallError):
        read_arguments(text)
