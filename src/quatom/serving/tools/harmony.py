"""gpt-oss: every piece of an answer is a message with a channel (harmony)."""

import re
from collections.abc import Mapping

from quatom.serving.tools.format import ToolFormat
from quatom.serving.tools.function import Function
from quatom.serving.tools.parser import CallParser, Parsed, ToolCall
from quatom.serving.tools.partial_text import held_back

_START, _CHANNEL, _MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
_ENDS: tuple[str, ...] = ("<|end|>", "<|call|>", "<|return|>", _START)
_HEADERS = (_START, _CHANNEL, "to=functions.")
_RECIPIENT = re.compile(r"to=functions\.([A-Za-z0-9_.\-]+)")
_ANALYSIS = re.compile(re.escape(_CHANNEL) + r"\s*analysis")


class HarmonyParser(CallParser):
    """analysis is reasoning, commentary to a function is a call, everything else is content."""

    markers = (_CHANNEL,)

    def __init__(self, functions: Mapping[str, Function]) -> None:
        super().__init__(functions)
        self._decided = Parsed()
        self._next = 0  # what comes before is decided

    def parse(self, text: str, *, final: bool, cut: bool = False) -> Parsed:
        """The answer so far."""
        while True:
            rest = text[self._next :]
            begins = rest.lstrip()
            if begins.startswith(_HEADERS):
                size = rest.find(_MESSAGE)
                if size < 0:
                    return self._with("", rest if final and not cut else "")
                header, ends = rest[:size], _ENDS
            elif not final and any(known.startswith(begins) for known in _HEADERS):
                return self._with("", "")
            else:  # a model that does not speak harmony
                size, header, ends = -len(_MESSAGE), "", (_START, _CHANNEL)
            begin = self._next + size + len(_MESSAGE)
            found = [(at, marker) for marker in ends if (at := text.find(marker, begin)) >= 0]
            if not found:
                body = text[begin:]
                if not final:
                    body = body[: len(body) - held_back(body, ends)]
                return self._with(header, body)
            end, marker = min(found)
            self._decided = self._with(header, text[begin:end])
            # A message that begins ends the one before it, and is read itself.
            self._next = end if marker in _HEADERS else end + len(marker)

    def _with(self, header: str, body: str) -> Parsed:
        """What is decided, and one more message."""
        done = self._decided
        made = Parsed(done.content, list(done.calls), done.reasoning)
        recipient = _RECIPIENT.search(header)
        if recipient is not None and recipient[1] in self.functions:
            made.calls.append(ToolCall(recipient[1], body))
        elif _ANALYSIS.search(header):
            made.reasoning += body
        else:
            made.content += body
        return made


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
    one_call=True,
    reasons=True,
    lead={
        "type": "tag",
        "begin": f"{_CHANNEL}analysis{_MESSAGE}",
        "content": {"type": "any_text"},
        "end": f"<|end|>{_START}assistant",
    },
    content_begin=f"{_CHANNEL}final{_MESSAGE}",
)
