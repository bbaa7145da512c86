"""gpt-oss: every piece of an answer is a message with a channel (harmony)."""

import re
from collections.abc import Mapping

from quatom.serving.tools.format import ToolFormat
from quatom.serving.tools.function import Function
from quatom.serving.tools.parser import CallParser, Parsed, ToolCall
from quatom.serving.tools.partial_text import held_back

_START, _CHANNEL, _MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>", _START)
_RECIPIENT = re.compile(r"to=functions\.([A-Za-z0-9_.\-]+)")
_ANALYSIS = re.compile(re.escape(_CHANNEL) + r"\s*analysis")


class HarmonyParser(CallParser):
    """analysis is reasoning, commentary to a function is a call, everything else is content."""

    markers = (_CHANNEL,)

    def __init__(self, functions: Mapping[str, Function]) -> None:
        super().__init__(functions)
        self._decided = Parsed()
        self._next = 0  # what stands before is decided

    def parse(self, text: str, *, final: bool) -> Parsed:
        """The answer so far."""
        while True:
            at = text.find(_MESSAGE, self._next)
            if at < 0:  # a header, or text of a model that does not speak harmony
                plain = not text[self._next :].lstrip().startswith((_CHANNEL, _START))
                if plain and (final or not _may_be_header(text[self._next :])):
                    return self._with("", text[self._next :], final=final)
                return self._copy()
            header, begin = text[self._next : at], at + len(_MESSAGE)
            ends = [e for marker in _ENDS if (e := text.find(marker, begin)) >= 0]
            if not ends:
                body = text[begin:]
                if not final:
                    body = body[: len(body) - held_back(body, _ENDS)]
                return self._with(header, body, final=final)
            end = min(ends)
            self._decided = self._with(header, text[begin:end], final=True)
            marker = next(m for m in _ENDS if text.startswith(m, end))
            self._next = end if marker == _START else end + len(marker)

    def _copy(self) -> Parsed:
        done = self._decided
        return Parsed(done.content, list(done.calls), done.reasoning)

    def _with(self, header: str, body: str, *, final: bool) -> Parsed:
        """What is decided, and one more message."""
        made = self._copy()
        recipient = _RECIPIENT.search(header)
        if recipient is not None and recipient[1] in self.functions:
            made.calls.append(ToolCall(recipient[1], body))
        elif _ANALYSIS.search(header):
            made.reasoning += body
        else:
            made.content += body
        return made


def _may_be_header(text: str) -> bool:
    text = text.lstrip()
    return _CHANNEL.startswith(text) or _START.startswith(text)


def _begin(name: str) -> str:
    return f"{_CHANNEL}commentary to=functions.{name} <|constrain|>json{_MESSAGE}"


HARMONY = ToolFormat(
    name="harmony",
    signs=(re.escape(_CHANNEL),),
    parser=HarmonyParser,
    tags=lambda functions, parallel: [
        {
            "type": "tag",
            "begin": _begin(f.name),
            "content": {"type": "json_schema", "json_schema": f.schema},
            "end": "",
        }
        for f in functions
    ],
    trigger=f"{_CHANNEL}commentary to=",
    special_tokens=(_START, _CHANNEL, _MESSAGE, "<|constrain|>", "<|end|>", "<|call|>"),
    reasons=True,
)
