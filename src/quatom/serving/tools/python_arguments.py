r"""Arguments of a Python call as JSON values, read token by token.

Nothing is parsed by Python itself: its parser recurses, and gives warnings, on what a model writes.
Values in JSON are Python here, too: `true` is True, `\/` is `/`, and a pair of `\u` escapes is
one character.
"""

import json
import re
from typing import Any

from quatom.serving.tools.partial_text import NotACallError

_TOKEN = re.compile(
    r"""\s*(?:
      (?P<string>"[^"\\]*(?:\\.[^"\\]*)*"|'[^'\\]*(?:\\.[^'\\]*)*')
    | (?P<word>[A-Za-z_]\w*)
    | (?P<number>[+\-]?[\d.][\w.]*(?:(?<=[eE])[+\-]?\d+)?)
    | (?P<mark>[()\[\]{},:=])
    | (?P<end>\Z)
    )""",
    re.VERBOSE | re.DOTALL,
)
_ESCAPE = re.compile(r"\\(u[\da-fA-F]{4}|U[\da-fA-F]{8}|x[\da-fA-F]{2}|.)", re.DOTALL)
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "v": "\v", "\n": ""}
_WORDS = {
    "True": "true",
    "False": "false",
    "None": "null",
    "true": "true",
    "false": "false",
    "null": "null",
}
_MARKS = {"(": "[", ")": "]"}


def read_arguments(text: str) -> list[tuple[str | None, Any]]:
    """(name, value) of each argument; None: it has no name.

    Args:
        text: everything between the brackets of a call.

    Raises:
        NotACallError: a value is no literal, or no value of JSON.
    """
    arguments: list[tuple[str | None, Any]] = []
    name: str | None = None
    value: list[str] = []  # JSON, piece by piece
    depth = pos = 0
    while True:
        token = _TOKEN.match(text, pos)
        if token is None:
            raise NotACallError
        pos, kind, piece = token.end(), token.lastgroup, token[token.lastgroup or 0]
        if not depth and (kind == "end" or piece == ","):
            if value:
                arguments.append((name, _value(value)))
            elif name is not None or kind != "end":
                raise NotACallError
            if kind == "end":
                return arguments
            name, value = None, []
        elif kind == "word" and not depth and not value and piece not in _WORDS:
            name, pos = piece, _equals(text, pos)
        else:
            if kind == "mark":
                depth += (piece in "([{") - (piece in ")]}")
                if piece in ")]}" and value[-1:] == [","]:
                    value.pop()
            value.append(_json(kind, piece))


def _equals(text: str, pos: int) -> int:
    token = _TOKEN.match(text, pos)
    if token is None or token["mark"] != "=":
        raise NotACallError
    return token.end()


def _json(kind: str | None, piece: str) -> str:
    """A token as JSON; `json.loads` refuses what is in a wrong place."""
    match kind:
        case "string":
            return json.dumps(_string(piece[1:-1]))
        case "word" if piece in _WORDS:
            return _WORDS[piece]
        case "number":
            return _number(piece)
        case "mark" if piece != "=":
            return _MARKS.get(piece, piece)
    raise NotACallError


def _value(pieces: list[str]) -> Any:
    try:
        return json.loads(" ".join(pieces))
    except (ValueError, RecursionError):
        raise NotACallError from None


def _number(text: str) -> str:
    for read in (lambda: int(text, 0), lambda: int(text), lambda: float(text)):
        try:
            return json.dumps(read(), allow_nan=False)
        except ValueError:
            continue
    raise NotACallError


def _string(text: str) -> str:
    if "\\" not in text:
        return text

    def unescaped(match: "re.Match[str]") -> str:
        code = match[1]
        if len(code) > 1:
            number = int(code[1:], 16)
            if number > 0x10FFFF:
                raise NotACallError
            return chr(number)
        return _ESCAPED.get(code, code if code in "\\'\"/" else match[0])

    made = _ESCAPE.sub(unescaped, text)
    # Two escapes may be one character.
    return made.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
