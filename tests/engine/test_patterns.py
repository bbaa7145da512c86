"""Regular expressions: what is generated matches under Python's `re` and under ECMA-262."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quatom.engine.structured.pattern import rust_literal, rust_match, rust_search
from quatom.errors import RequestError
from tests.engine.constrained import compile_here

pytest.importorskip("llguidance")

FOUND = {
    "^a|b$": (["a", "ax", "xb", "b"], ["xa", "bx", ""]),
    "^$|^a": (["", "ab"], ["b"]),
    "(^a|b)c": (["ac", "xbc", "acx"], ["xac"]),
    "(^|,)x(,|$)": (["x", "a,x", "x,a", ",x,"], ["ax", "xa"]),
    "^[^a]$": (["b", "\n", "é", "\U0001f600"], ["a", "bb", ""]),
    "^.$": (["é"], ["\n", "\r", "\u2028", "ab"]),
    "[[a]": (["[", "xa"], ["b"]),
    "^[a&&b]+$": (["a&b"], ["c"]),
    "^\\/\\-\\$\\.$": (["/-$."], ["/-$x"]),
    "^\\x41\\u00e9\\t$": (["Aé\t"], ["A"]),
    "^(?:ab){2,3}?$": (["abab", "ababab"], ["ab", "abababab"]),
    "^a{2}$": (["aa"], ["a"]),
    "^a{$": (["a{"], ["a"]),
    "": (["", "anything"], []),
    "^\\d$": (["7"], ["٣", "x"]),
    "^\\D$": (["x", "é"], ["7", "٣"]),
    "^\\w$": (["_", "z"], ["é", "-"]),
    "^\\W$": (["-", " "], ["_", "é", "½", "z"]),
    "^\\s$": ([" ", "\u00a0"], ["\x1c", "\ufeff", "x"]),
    "^\\S$": (["x"], [" ", "\x1c", "\ufeff", "\x85"]),
    "^[^\\W\\d]$": (["z", "_"], ["7", "-", "é"]),
    "^[\\b]$": (["\b"], ["b"]),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # [[ may mean more some day
@pytest.mark.parametrize("pattern", FOUND)
def test_search(pattern):
    found, missed = FOUND[pattern]
    constraint = compile_here("grammar", f"start: /{rust_search(pattern)}/")
    assert [text for text in found if not constraint.accepts(text)] == []
    assert [text for text in missed if constraint.accepts(text)] == []
    assert all(re.search(pattern, text) for text in found)


def test_match_is_of_the_whole_text():
    for pattern in ("a+|b", "^(a+|b)$"):
        constraint = compile_here("regex", pattern)
        assert [t for t in ("a", "aaa", "b", "ab", "xa", "") if constraint.accepts(t)] == [
            "a",
            "aaa",
            "b",
        ]


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("^(?=.*[0-9]).+$", "lookahead"),
        ("^(?!a)", "lookahead"),
        ("(?<=a)b", "lookahead or lookbehind"),
        ("(a)\\1", "back reference"),
        ("(?P<q>a)(?P=q)", "back reference"),
        ("(?i)a", "flags"),
        ("(?i:a)", "flags"),
        ("a^b", "inside of an expression"),
        ("(?:a$)+b", "inside of an expression"),
        ("\\bfoo", "word boundary"),
        ("\\p{L}", "escape"),
        ("\\Aa", "escape"),
        ("a{,3}", "{,"),
        ("a++", "possessive"),
        ("(?>a)", "atomic"),
        ("(", "not a regular expression"),
        ("\\ud83d\\ude00", "half a character"),
        ("(" * 5000 + ")" * 5000, "nested too deeply"),
    ],
)
def test_what_the_languages_do_not_share_is_refused(pattern, reason):
    with pytest.raises(RequestError, match=re.escape(reason)):
        rust_search(pattern)


def test_literals():
    text = 'a/"\\\n\x00é\U0001f600|'
    assert compile_here("grammar", f"start: /{rust_literal(text)}/").accepts(text)
    with pytest.raises(RequestError, match="half a character"):
        rust_literal("\ud83d")


ATOMS = st.sampled_from(
    ["a", "b", "\\d", "\\w", "\\s", "\\S", "\\W", ".", "[ab]", "[^a]", "[^\\d]"]
)
PATTERNS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
        st.tuples(inner, st.sampled_from(["?", "*", "+", "{1,2}", "{2}"])).map(
            lambda pair: f"(?:{pair[0]}){pair[1]}"
        ),
    ),
    max_leaves=6,
)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(PATTERNS)
def test_random_expressions(pattern):
    for text in compile_here("regex", pattern).texts(4, length=60):
        assert re.fullmatch(pattern, text), (pattern, text)
    assert rust_match(pattern)
