"""Qwen3-Coder: a call as XML, each argument in a tag of its own."""

import json
from typing import Any

from quatom.errors import RequestError
from quatom.serving.tools.by_argument import arguments, const, either, json_value, sequence
from quatom.serving.tools.format import Grammar, ToolFormat
from quatom.serving.tools.function import Function
from quatom.serving.tools.parser import Block, BlockParser, ToolCall
from quatom.serving.tools.partial_text import NotACallError, PendingError, held_back

_BEGIN, _END = "<tool_call>", "</tool_call>"
_FUNCTION, _FUNCTION_END = "<function=", "</function>"
_PARAMETER, _PARAMETER_END = "<parameter=", "</parameter>"


class QwenCoderParser(BlockParser):
    """<tool_call><function=f><parameter=a>1</parameter></function></tool_call>.

    Strings are written without quotes; what a value is, its schema says.
    """

    markers = (_BEGIN, _FUNCTION)

    def read(self, start: int) -> Block:
        """One call."""
        source = self.source
        pos = start
        if source.text.startswith(_BEGIN, pos):
            pos = source.space(pos + len(_BEGIN))
        pos = source.expect(_FUNCTION, pos)
        end = source.find(">", pos)
        name = source.text[pos:end].strip()
        if name not in self.functions:
            raise NotACallError
        written: list[str] = []  # "key": value, of each argument
        pos = end + 1
        try:
            while source.starts(_PARAMETER, source.space(pos)):
                pos = source.space(pos) + len(_PARAMETER)
                end = source.find(">", pos)
                key = source.text[pos:end].strip()
                value, pos = self._value(name, key, end + 1)
                written.append(f"{json.dumps(key, ensure_ascii=False)}: {value}")
                if pos < 0:
                    return Block([_call(name, written, closed=False)], self._end_of_text())
            for marker in (_FUNCTION_END, _END):
                if source.starts(marker, source.space(pos)):
                    pos = source.space(pos) + len(marker)
            return Block([_call(name, written, closed=True)], pos)
        except PendingError:
            return Block([_call(name, written, closed=False)], None)
        except NotACallError:  # the text ended inside a tag or a value
            return Block([_call(name, written, closed=False)], len(source.text))

    def _end_of_text(self) -> int | None:
        return len(self.source.text) if self.source.final else None

    def _value(self, name: str, key: str, pos: int) -> tuple[str, int]:
        """JSON of an argument, and the position after it (-1: it goes on)."""
        source = self.source
        schema = self.functions[name].parameters.get("properties", {}).get(key)
        end = source.text.find(_PARAMETER_END, pos)
        if end >= 0:
            text = source.text[pos:end].removeprefix("\n").removesuffix("\n")
            return _as_json(text, schema), end + len(_PARAMETER_END)
        if not _is_string(schema):
            source.wait()
        rest = source.text[pos:]
        if not source.final:
            rest = rest[: len(rest) - held_back(rest, ("\n" + _PARAMETER_END, _PARAMETER_END))]
        return json.dumps(rest.removeprefix("\n"), ensure_ascii=False)[:-1], -1


def _call(name: str, written: list[str], *, closed: bool) -> ToolCall:
    if not written and not closed:
        return ToolCall(name, "")
    return ToolCall(name, "{" + ", ".join(written) + ("}" if closed else ""))


def _is_string(schema: Any) -> bool:
    if not isinstance(schema, dict):
        return True
    if "type" in schema:
        return bool(schema["type"] == "string")
    return all(isinstance(value, str) for value in schema.get("enum", [None]))


def _as_json(text: str, schema: Any) -> str:
    if not _is_string(schema):
        try:
            json.loads(text)
            return text.strip()
        except (ValueError, RecursionError):
            if text.strip() in ("True", "False", "None"):
                return {"True": "true", "False": "false", "None": "null"}[text.strip()]
    return json.dumps(text, ensure_ascii=False)


def _write(key: str, schema: dict[str, Any]) -> Grammar:
    begin, end = f"{_PARAMETER}{key}>\n", f"\n{_PARAMETER_END}\n"
    if not _is_string(schema):
        return sequence(const(begin), json_value(schema), const(end))
    if "enum" in schema:
        return sequence(const(begin), either(*map(const, schema["enum"])), const(end))
    for keyword in ("pattern", "format", "minLength", "maxLength", "const"):
        if keyword in schema:
            raise RequestError(
                f"this model writes strings without quotes, so that {keyword!r} of argument "
                f"{key!r} cannot be enforced"
            )
    return {"type": "tag", "begin": begin, "content": {"type": "any_text"}, "end": end}


def _tag(function: Function) -> Grammar:
    return {
        "type": "tag",
        "begin": f"{_BEGIN}\n{_FUNCTION}{function.name}>\n",
        "content": arguments(function, _write, ""),
        "end": f"{_FUNCTION_END}\n{_END}",
    }


QWEN_CODER = ToolFormat(
    name="qwen-coder",
    signs=(_FUNCTION,),
    parser=QwenCoderParser,
    tags=lambda functions, parallel: [_tag(f) for f in functions],
    separator="\n",
    trigger=_BEGIN,
    special_tokens=(_BEGIN, _END),
)
