"""Llama 3.2 and 4: the answer is a Python list of calls, [f(a=1), g()]."""

import json
import re
from collections.abc import Mapping
from keyword import iskeyword
from typing import Any

from quatom.errors import RequestError
from quatom.serving.tools.by_argument import arguments, const, json_value, sequence
from quatom.serving.tools.format import Grammar, ToolFormat, one_or_more
from quatom.serving.tools.function import Function
from quatom.serving.tools.parser import Block, BlockParser, ToolCall
from quatom.serving.tools.partial_text import PYTHON, NotACallError, PendingError
from quatom.serving.tools.python_arguments import read_arguments

_NAME = re.compile(r"[A-Za-z0-9_.\-]+")
_BEGIN, _END = "<|python_start|>", "<|python_end|>"


class PythonicParser(BlockParser):
    """[f(a=1, b="x"), g()]; a call is handed on when it is complete, its values as JSON."""

    markers = (_BEGIN,)
    bare = "["

    def __init__(self, functions: Mapping[str, Function]) -> None:
        super().__init__(functions)
        self._arguments: dict[int, str] = {}  # of the calls whose brackets open there

    def read(self, start: int) -> Block:
        """The list of calls."""
        source = self.source
        pos = start + len(_BEGIN) if source.text.startswith(_BEGIN, start) else start
        pos = source.expect("[", source.space(pos))
        calls: list[ToolCall] = []
        last = pos
        try:
            while True:
                call, pos = self._call(source.space(pos))
                calls.append(call)
                last = pos
                pos = source.space(pos)
                if source.char(pos) != ",":
                    last = source.expect("]", pos)
                    after = source.space(last)
                    if source.starts(_END, after):
                        last = after + len(_END)
                    return Block(calls, last)
                pos += 1
        except (PendingError, NotACallError) as reason:
            if not calls:
                raise
            return Block(calls, None if isinstance(reason, PendingError) else last)

    def _call(self, pos: int) -> tuple[ToolCall, int]:
        source = self.source
        name = _NAME.match(source.text, pos)
        if name is None:
            source.char(pos)
            raise NotACallError
        source.char(name.end())
        if name[0] not in self.functions:
            raise NotACallError
        begin = source.space(name.end())
        source.expect("(", begin)
        end = source.value(begin, PYTHON)
        if begin not in self._arguments:
            function = self.functions[name[0]]
            self._arguments[begin] = _arguments(source.text[begin + 1 : end - 1], function)
        return ToolCall(name[0], self._arguments[begin]), end


def _arguments(text: str, function: Function) -> str:
    """The arguments as a JSON object; those without a name are in the schema's order."""
    names = iter(function.parameters.get("properties", {}))
    given: dict[str, Any] = {}
    for name, value in read_arguments(text):
        key = next(names, None) if name is None else name
        if key is None or key in given:
            raise NotACallError
        given[key] = value
    return json.dumps(given, ensure_ascii=False)


def _tags(functions: Any, parallel: bool) -> list[Grammar]:
    def write(key: str, schema: dict[str, Any]) -> Grammar:
        if not key.isidentifier() or iskeyword(key):
            raise RequestError(
                f"this model writes calls in Python, where {key!r} cannot name an argument"
            )
        return sequence(const(f"{key}="), json_value(schema))

    calls = [
        {
            "type": "tag",
            "begin": f"{f.name}(",
            "content": arguments(f, write, ", "),
            "end": ")",
        }
        for f in functions
    ]
    return [
        {"type": "tag", "begin": "[", "content": one_or_more(calls, ", ", parallel), "end": "]"}
    ]


PYTHONIC = ToolFormat(
    name="pythonic",
    signs=(r"\[func\w*\(", r"<\|python_start\|>"),
    parser=PythonicParser,
    tags=_tags,
    special_tokens=(_BEGIN, _END),
)
