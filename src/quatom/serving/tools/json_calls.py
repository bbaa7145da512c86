"""Calls written as JSON objects that hold a name and arguments, alone or in a list.

    {"name": "f", "arguments": {...}}        [{"name": "f", "arguments": {...}}, ...]

Several formats use this form and differ in what surrounds it. A call counts as one as soon as
its name is that of an offered function and its arguments have begun; from there its arguments are
handed on as the model writes them, even if they turn out not to be JSON, as OpenAI does.
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from quatom.serving.tools.format import Grammar, one_or_more
from quatom.serving.tools.function import Function
from quatom.serving.tools.parser import Block, BlockParser, ToolCall
from quatom.serving.tools.partial_text import NotACallError, PendingError

_KEYS = ("name", "arguments", "parameters", "id", "type")
_ARGUMENTS = ("arguments", "parameters")
_NEXT = re.compile(r"\s*[,;]?\s*(?=\{)")
_CLOSERS = re.compile(r"[\s}\]]*")
_MAY_GO_ON = re.compile(r"[\s}\]]*[,;]?\s*\Z")


class JsonCallParser(BlockParser):
    """A marker, JSON calls, perhaps an end marker."""

    end_markers: tuple[str, ...] = ()

    def __init__(self, functions: Mapping[str, Function]) -> None:
        super().__init__(functions)
        # By where a block begins: its whole calls, the end of the last one, and what is next.
        self._progress: dict[int, tuple[list[ToolCall], int, int]] = {}

    def read(self, start: int) -> Block:
        """The calls after the marker at `start`."""
        marker = next((m for m in self.markers if self.source.text.startswith(m, start)), "")
        return self.read_json(start + len(marker))

    def read_json(self, start: int) -> Block:
        """One call, or several with or without a list around them."""
        source = self.source
        if start not in self._progress:
            pos = source.space(start)
            if source.char(pos) == "[":
                pos = source.space(pos + 1)
            self._progress[start] = [], pos, pos
        calls, last, pos = self._progress[start]
        while True:
            try:
                call, end = self._call(pos)
            except (PendingError, NotACallError) as reason:
                if not calls:
                    raise
                ended = self._close(last) if isinstance(reason, NotACallError) else None
                return Block(calls.copy(), ended)
            if end is None:
                return Block([*calls, call], None)
            following = _NEXT.match(source.text, end)
            if following is None:
                return Block([*calls, call], self._close(end))
            calls.append(call)
            last, pos = end, following.end()
            self._progress[start] = calls, last, pos

    def _call(self, pos: int) -> tuple[ToolCall, int | None]:
        """One object, and the position after it (None: it goes on)."""
        source = self.source
        name: str | None = None
        arguments: str | None = None
        pos = source.expect("{", pos)
        while True:
            key, pos = self._string(source.space(pos))
            if key not in _KEYS:
                raise NotACallError
            pos = source.space(source.expect(":", source.space(pos)))
            if key in _ARGUMENTS and name is not None:
                return self._arguments(name, pos)
            end = source.value(pos)
            if key == "name":
                name, _ = self._string(pos)
                if name not in self.functions:
                    raise NotACallError
            elif key in _ARGUMENTS:
                arguments = _plain_arguments(source.text[pos:end])
            pos = source.space(end)
            if source.char(pos) == "}" and name is not None:
                return ToolCall(name, "{}" if arguments is None else arguments), pos + 1
            pos = source.expect(",", pos)

    def _arguments(self, name: str, pos: int) -> tuple[ToolCall, int | None]:
        source = self.source
        if source.char(pos) != "{":
            end_of_value = source.value(pos)
            plain = _plain_arguments(source.text[pos:end_of_value])
            return ToolCall(name, plain), self._object_end(end_of_value)
        arguments, end = self.argument_object(pos)
        return ToolCall(name, arguments), None if end is None else self._object_end(end)

    def argument_object(self, pos: int) -> tuple[str, int | None]:
        """The object that begins there as far as it is written, and the position after it.

        What stops being JSON is taken up to the next marker, which ends it.
        """
        source, text = self.source, self.source.text
        scan = source.scan(pos)
        if scan.end is not None:
            return text[pos : scan.end], scan.end
        if scan.broken is None:
            return text[pos:], len(text) if source.final else None
        markers = (*self.end_markers, *self.markers)
        ends = [at for m in markers if (at := text.find(m, scan.broken)) >= 0]
        if ends:
            return text[pos : min(ends)], min(ends)
        if source.final:
            return text[pos:], len(text)
        return text[pos : scan.broken], None

    def _object_end(self, pos: int) -> int | None:
        """Position after the members that follow the arguments; None: it is not known yet."""
        source, last = self.source, pos
        try:
            while source.char(source.space(pos)) == ",":
                _, pos = self._string(source.space(source.space(pos) + 1))
                pos = source.space(source.expect(":", source.space(pos)))
                pos = source.value(pos)
            return source.expect("}", source.space(pos))
        except PendingError:
            return None
        except NotACallError:
            return last

    def _close(self, pos: int) -> int | None:
        """Position after closing brackets and the end marker; None: it is not known yet."""
        source = self.source
        if not source.final and _MAY_GO_ON.match(source.text, pos):
            return None
        end = _CLOSERS.match(source.text, pos).end()  # type: ignore[union-attr]
        for marker in self.end_markers:
            try:
                if source.starts(marker, end):
                    return end + len(marker)
            except PendingError:
                return None
        return end

    def _string(self, pos: int) -> tuple[str, int]:
        if self.source.char(pos) != '"':
            raise NotACallError
        end = self.source.value(pos)
        value = _loads(self.source.text[pos:end])
        if not isinstance(value, str):
            raise NotACallError
        return value, end


def _plain_arguments(text: str) -> str:
    """Arguments as text of an object: also of a string that holds one, and of null."""
    value = _loads(text)
    if isinstance(value, str):
        text = value.strip()
    if value is None or not text:
        return "{}"
    if text.startswith("{"):
        return text
    raise NotACallError


def _loads(text: str) -> Any:
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        raise NotACallError from None


def json_call_tags(
    functions: Iterable[Function], *, key: str = "arguments", begin: str = "", end: str = ""
) -> list[Grammar]:
    """A tag for each function: its call as a JSON object.

    Args:
        functions: those that may be called.
        key: the member that holds the arguments.
        begin: the text before the object.
        end: the text after it.
    """
    return [
        {
            "type": "tag",
            "begin": f'{begin}{{"name": {json.dumps(f.name)}, "{key}": ',
            "content": {"type": "json_schema", "json_schema": f.schema},
            "end": "}" + end,
        }
        for f in functions
    ]


def json_list_tag(
    functions: Iterable[Function], parallel: bool, *, begin: str, end: str
) -> list[Grammar]:
    """One tag for a list of calls of any of the functions."""
    return [
        {
            "type": "tag",
            "begin": begin,
            "content": one_or_more(json_call_tags(functions), ", ", parallel),
            "end": end,
        }
    ]
