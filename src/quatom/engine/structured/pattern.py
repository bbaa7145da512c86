r"""Regular expressions: from the language that ECMA-262 and Python's `re` share to Rust's.

JSON Schema's patterns are ECMA-262, its validator in Python reads them with `re`, and llguidance's
automata speak the Rust crate's dialect. An expression is parsed by `re`'s own parser and written
anew, so that what is generated matches in all three. Where ECMA-262 and Python disagree about a
class, such as `\w`, the narrower one is generated; what only one of them knows is refused.
"""

import re
from collections.abc import Iterable
from re import _constants as codes  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

from quatom.errors import RequestError

ANYTHING = r"(?s:.*)"
NEWLINES = r"\n\r\x{2028}\x{2029}"  # not matched by `.` in ECMA-262; Python excludes \n alone
SPACES = r"\t\n\x0b\x0c\r \x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}"

CLASSES = {
    # What both languages hold to be in the class, and what either does. \p{Cn}: not assigned in
    # Rust's version of Unicode, but perhaps in another.
    codes.CATEGORY_DIGIT: ("0-9", r"\p{Nd}\p{Cn}"),
    codes.CATEGORY_NOT_DIGIT: (r"[^\p{Nd}\p{Cn}]", "[^0-9]"),
    codes.CATEGORY_WORD: ("0-9A-Za-z_", r"\p{L}\p{N}_\p{Cn}"),
    codes.CATEGORY_NOT_WORD: (r"[^\p{L}\p{N}_\p{Cn}]", "[^0-9A-Za-z_]"),
    codes.CATEGORY_SPACE: (SPACES, SPACES + r"\x1c-\x1f\x{85}\x{feff}"),
    codes.CATEGORY_NOT_SPACE: (rf"[^{SPACES}\x1c-\x1f\x{{85}}\x{{feff}}]", f"[^{SPACES}]"),
}
UNSUPPORTED = {
    codes.ASSERT: "lookahead or lookbehind",
    codes.ASSERT_NOT: "lookahead or lookbehind",
    codes.GROUPREF: "a back reference",
    codes.GROUPREF_EXISTS: "a conditional group",
    codes.ATOMIC_GROUP: "an atomic group",
    codes.POSSESSIVE_REPEAT: "a possessive repetition",
}
ESCAPES = re.compile(r"\\(.)|(\{,)", re.DOTALL)
SHARED_ESCAPES = frozenset("dDwWsSbBtnrfvxu0123456789")
SURROGATES = range(0xD800, 0xE000)


def rust_search(pattern: str) -> str:
    """A Rust expression of all texts in which `pattern` is found.

    Raises:
        RequestError: the pattern is invalid, or has something that cannot be enforced.
    """
    return _search(_parse(pattern))


def rust_match(pattern: str) -> str:
    """A Rust expression of all texts that `pattern` matches from beginning to end.

    Raises:
        RequestError: the pattern is invalid, or has something that cannot be enforced.
    """
    items = _parse(pattern)
    start, end = _anchors(items)
    return _sequence(items[start : len(items) - end])


def _parse(pattern: str) -> list[Any]:
    for escape in ESCAPES.finditer(pattern):
        name = escape[1]
        if name is None:
            raise RequestError("`{,` means different things in ECMA-262 and Python: write `{0,`")
        if name.isalnum() and name not in SHARED_ESCAPES:
            raise RequestError(f"the escape \\{name} is not supported")
    try:
        tree = parser.parse(pattern)
    except (re.error, OverflowError) as error:
        raise RequestError(f"not a regular expression: {error}") from error
    except RecursionError as error:
        raise RequestError("the expression is nested too deeply") from error
    if tree.state.flags & ~re.UNICODE.value:
        raise RequestError("flags such as (?i) are not supported: write both cases as [aA]")
    return list(tree)


def _anchors(items: list[Any]) -> tuple[bool, bool]:
    """Whether the items begin with ^ and whether they end with $."""
    start = bool(items) and items[0] == (codes.AT, codes.AT_BEGINNING)
    end = bool(items) and items[-1] == (codes.AT, codes.AT_END)
    return start, end


def _search(items: list[Any]) -> str:
    start, end = _anchors(items)
    inner = items[start : len(items) - end]
    for i in (0, len(inner) - 1):  # ^ and $ may be in a group or in an alternative at either end
        if inner and _holds_anchor(inner[i]):
            options = _options(*inner[i])
            around = items[: start + i], items[start + i + 1 :]
            return "|".join(f"(?:{_search([*around[0], *o, *around[1]])})" for o in options)
    return f"{'' if start else ANYTHING}(?:{_sequence(inner)}){'' if end else ANYTHING}"


def _options(op: Any, value: Any) -> list[list[Any]]:
    """What may take the place of a group or an alternative."""
    if op is codes.SUBPATTERN:
        return [_group(value)]
    if op is codes.BRANCH:
        return [list(branch) for branch in value[1]]
    raise RequestError("^ and $ inside of an expression are not supported")


def _holds_anchor(item: Any) -> bool:
    op, value = item
    if op in (codes.MAX_REPEAT, codes.MIN_REPEAT):
        return any(map(_holds_anchor, value[2]))
    if op in (codes.SUBPATTERN, codes.BRANCH):
        return any(_holds_anchor(inner) for option in _options(op, value) for inner in option)
    return op is codes.AT and value in (codes.AT_BEGINNING, codes.AT_END)


def _sequence(items: Iterable[Any]) -> str:
    return "".join(_item(op, value) for op, value in items)


def _item(op: Any, value: Any) -> str:
    if op is codes.LITERAL:
        return f"[{_range(value, value)}]"
    if op is codes.NOT_LITERAL:
        return f"[^{_range(value, value)}]"
    if op is codes.ANY:
        return f"[^{NEWLINES}]"
    if op is codes.IN:
        return _class(value)
    if op is codes.BRANCH:
        return "(?:" + "|".join(_sequence(branch) for branch in value[1]) + ")"
    if op is codes.SUBPATTERN:
        return f"(?:{_sequence(_group(value))})"
    if op in (codes.MAX_REPEAT, codes.MIN_REPEAT):
        low, high, repeated = value
        most = "" if high is codes.MAXREPEAT else high
        return f"(?:{_sequence(repeated)}){{{low},{most}}}"
    if op is codes.AT:
        kind = {codes.AT_BEGINNING: "^", codes.AT_END: "$"}.get(value, "a word boundary")
        raise RequestError(f"{kind} inside of an expression is not supported")
    raise RequestError(f"{UNSUPPORTED.get(op, str(op))} is not supported")


def _group(value: Any) -> list[Any]:
    _, added, removed, items = value
    if added or removed:
        raise RequestError("flags such as (?i:) are not supported: write both cases as [aA]")
    return list(items)


def _class(members: list[Any]) -> str:
    negated = members[0][0] is codes.NEGATE
    parts = []
    for op, value in members[negated:]:
        if op is codes.CATEGORY:
            parts.append(CLASSES[value][negated])
        else:
            parts.append(_range(*(value if op is codes.RANGE else (value, value))))
    return f"[{'^' if negated else ''}{''.join(parts)}]"


def _range(low: int, high: int) -> str:
    """Code points from low to high inside of a class; there are no surrogates in UTF-8."""
    pieces = [(low, min(high, SURROGATES.start - 1)), (max(low, SURROGATES.stop), high)]
    found = "".join(rf"\x{{{a:x}}}-\x{{{b:x}}}" for a, b in pieces if a <= b)
    if not found:
        raise RequestError(f"\\u{low:04x} is half a character: write the whole one")
    return found


def rust_literal(text: str) -> str:
    """A Rust expression of this text alone.

    Raises:
        RequestError: it has half of a character.
    """
    return "".join(f"[{_range(ord(char), ord(char))}]" for char in text)
