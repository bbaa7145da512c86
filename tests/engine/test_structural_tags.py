"""Structural tags, choices and grammars: which texts are allowed, and what is refused."""

import json

import pytest

from quatom.errors import RequestError
from tests.engine.constrained import compile_here

pytest.importorskip("llguidance")

CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
SCHEMA = {"type": "json_schema", "json_schema": CITY}
NUMBER = {"type": "regex", "pattern": "[0-9]+"}
TAGS = [
    {"begin": "<f=weather>", "content": SCHEMA, "end": "</f>"},
    {"begin": "<f=add>", "content": NUMBER, "end": "</f>"},
]


def const(value):
    return {"type": "const_string", "value": value}


def sequence(*elements):
    return {"type": "sequence", "elements": list(elements)}


def triggered(**more):
    return {"type": "triggered_tags", "triggers": ["<f="], "tags": TAGS, **more}


def separated(separator, **more):
    return {"type": "tags_with_separator", "tags": TAGS, "separator": separator, **more}


WEATHER = '<f=weather>{"city": "Rome"}</f>'
ADD = "<f=add>12</f>"

FORMATS = {
    "const": (const("hé"), ["hé"], ["h", "hé!", ""]),
    "schema": (SCHEMA, ['{"city": "Oslo"}'], ['{"city": "Bern"}', "{}"]),
    "regex": (NUMBER, ["12"], ["", "1a"]),
    "grammar": ({"type": "grammar", "grammar": 'start: "a" "b"*'}, ["a", "abb"], ["b"]),
    "sequence of lexemes": (sequence(NUMBER, const("1%")), ["21%", "11%"], ["1%", "21"]),
    "or": ({"type": "or", "elements": [const("no"), SCHEMA]}, ["no", '{"city": "Rome"}'], ["{"]),
    "or nothing": (
        sequence(const("a"), {"type": "or", "elements": [const(""), SCHEMA]}),
        ["a", 'a{"city": "Rome"}'],
        ["a{"],
    ),
    "any text": ({"type": "any_text"}, ["", "a\n<f=b"], []),
    "any text in a tag": (
        {"type": "tag", "begin": "<t>", "content": {"type": "any_text"}, "end": "</t>"},
        ["<t></t>", "<t>a<b</t>"],
        ["<t>", "<t></t></t>", "a"],
    ),
    "text, its end, then a schema": (
        sequence({"type": "any_text"}, const("</think>"), NUMBER),
        ["hm</think>7", "</think>1"],
        ["hm", "hm</think>", "hm</think>x", "a</think>b</think>1"],
    ),
    "triggered": (
        triggered(),
        ["", "free text", f"so: {WEATHER} and {ADD}.", WEATHER + ADD, "a < b, <g"],
        ["so: <f=", "so: <f=other>", "<f=add>x</f>", WEATHER[:-1]],
    ),
    "triggered, at least one": (
        triggered(at_least_one=True),
        [ADD, WEATHER + " text " + ADD],
        ["", "text", "text " + ADD],
    ),
    "triggered, one at most": (
        triggered(stop_after_first=True),
        ["", "text", "text " + ADD, WEATHER],
        [ADD + ADD, ADD + "text"],
    ),
    "triggered, just one": (
        triggered(at_least_one=True, stop_after_first=True),
        [ADD, WEATHER],
        ["", ADD + ADD, ADD + " "],
    ),
    "separated": (separated(", "), ["", ADD, f"{ADD}, {WEATHER}, {ADD}"], [ADD + ADD, ADD + ", "]),
    "separated by nothing": (separated("", at_least_one=True), [ADD, ADD + WEATHER], ["", "x"]),
    "separated, just one": (
        separated("", at_least_one=True, stop_after_first=True),
        [ADD, WEATHER],
        ["", ADD + ADD],
    ),
    "a tag around tags": (
        {
            "type": "tag",
            "begin": "[",
            "content": separated(", ", at_least_one=True),
            "end": "]",
        },
        [f"[{ADD}]", f"[{ADD}, {WEATHER}]"],
        ["[]", "[" + ADD],
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name):
    wanted, allowed, forbidden = FORMATS[name]
    constraint = compile_here("structural_tag", {"type": "structural_tag", "format": wanted})
    assert [text for text in allowed if not constraint.accepts(text)] == []
    assert [text for text in forbidden if constraint.accepts(text)] == []


def test_the_older_form():
    tag = {
        "type": "structural_tag",
        "structures": [
            {"begin": "<f=weather>", "schema": CITY, "end": "</f>"},
            {"begin": "<f=any>", "end": "</f>"},
        ],
        "triggers": ["<f="],
    }
    constraint = compile_here("structural_tag", tag)
    assert constraint.accepts(f"a {WEATHER} b <f=any>[1]</f>")
    assert not constraint.accepts('<f=weather>{"city": 1}</f>')


def test_special_tokens_stand_for_themselves():
    tag = {"type": "tag", "begin": "<user>[", "content": NUMBER, "end": "]<assistant>"}
    constraint = compile_here("structural_tag", {"type": "structural_tag", "format": tag})
    assert constraint.accepts([258, *b"[7]", 259])
    assert not constraint.accepts("<user>[7]<assistant>")
    wanted = {"type": "triggered_tags", "triggers": ["<user>"], "tags": [tag]}
    constraint = compile_here("structural_tag", {"type": "structural_tag", "format": wanted})
    assert constraint.accepts([*b"text <user", 258, *b"[7]", 259, *b"more"])
    assert not constraint.accepts([*b"text", 258, *b"(", 259])
    reasoned = sequence({"type": "any_text"}, const("<user>"), SCHEMA)
    constraint = compile_here("structural_tag", {"type": "structural_tag", "format": reasoned})
    assert constraint.accepts([*b"hm", 258, *b'{"city": "Oslo"}'])


@pytest.mark.parametrize(
    ("tag", "reason"),
    [
        ({"type": "structural_tag"}, "structures, triggers is missing"),
        ({"type": "other", "format": const("a")}, "$.type"),
        (
            {"type": "structural_tag", "format": {"type": "token"}},
            "$.format.type: the format 'token'",
        ),
        ({"type": "structural_tag", "format": {**const("a"), "style": "x"}}, "$.format.style"),
        ({"type": "structural_tag", "format": {"type": "any_text", "excludes": ["a"]}}, "excludes"),
        (
            {"type": "structural_tag", "format": triggered(triggers=["<g"])},
            "begins with no trigger",
        ),
        ({"type": "structural_tag", "format": triggered(at_least_one=1)}, "true or false"),
        ({"type": "structural_tag", "format": sequence(triggered(), const("x"))}, "can follow"),
        ({"type": "structural_tag", "format": sequence({"type": "any_text"}, SCHEMA)}, "any_text"),
        (
            {
                "type": "structural_tag",
                "format": sequence(
                    const("a"), {**SCHEMA, "json_schema": {"items": {"uniqueItems": True}}}
                ),
            },
            "$.format.elements[1].json_schema.items.uniqueItems",
        ),
        (
            {"type": "structural_tag", "format": {"type": "regex", "pattern": "(?=a)"}},
            "$.format.pattern: lookahead",
        ),
        ("{", "must be JSON"),
    ],
)
def test_what_is_refused(tag, reason):
    with pytest.raises(RequestError) as caught:
        compile_here("structural_tag", tag)
    assert reason in str(caught.value)


def test_depth_is_bounded():
    nested = const("a")
    for _ in range(100):
        nested = sequence(nested)
    with pytest.raises(RequestError, match="nested more than"):
        compile_here("structural_tag", {"type": "structural_tag", "format": nested})


def test_choices():
    choices = ["yes", "no", "not sure", 'a "b"\n/|.*', "é\U0001f600"]
    constraint = compile_here("choice", choices)
    assert all(constraint.accepts(choice) for choice in choices)
    assert not any(constraint.accepts(text) for text in ("", "ye", "yesno", "a b"))
    assert set(constraint.texts(40)) <= set(choices)
    for wrong in ([], [""], [1], {}):
        with pytest.raises(RequestError, match="choice"):
            compile_here("choice", wrong)


def test_grammars_of_both_kinds():
    lark = 'start: expr\nexpr: term ("+" term)*\nterm: /[0-9]+/ | "(" expr ")"'
    gbnf = 'root ::= expr\nexpr ::= term ("+" term)*\nterm ::= [0-9]+ | "(" expr ")"'
    for grammar in (lark, gbnf):
        constraint = compile_here("grammar", grammar)
        assert constraint.accepts("1+(2+33)")
        assert not constraint.accepts("1+")
    for wrong in ("root ::= ", "start: undefined", "", 'start: %json {"lenient": 1}'):
        with pytest.raises(RequestError, match="grammar"):
            compile_here("grammar", wrong)


def test_json_has_one_form():
    constraint = compile_here("json_object", "")
    assert constraint.accepts('{"a": [1, {"b": null}], "c": "d"}')
    assert not constraint.accepts('{"a":1}')
    assert not constraint.accepts('{ "a": 1}')
    for text in constraint.texts(10):
        assert isinstance(json.loads(text), dict)
