"""Mistral: after [TOOL_CALLS] a list of JSON calls, or a name and its arguments."""

import re
import secrets
import string

from quatom.serving.tools.format import ToolFormat
from quatom.serving.tools.json_calls import JsonCallParser, json_list_tag
from quatom.serving.tools.parser import Block, ToolCall
from quatom.serving.tools.partial_text import NotACallError

_NAME = re.compile(r"[A-Za-z0-9_.\-]+")
_ID = re.compile(r"[A-Za-z0-9_\-]*")
_ID_LENGTH = 9  # the models' templates refuse others


def mistral_call_id() -> str:
    """Nine letters and digits."""
    alphabet = string.ascii_letters + string.digits
    return "".join(secrets.choice(alphabet) for _ in range(_ID_LENGTH))


class MistralParser(JsonCallParser):
    """[TOOL_CALLS][{...}, ...], [TOOL_CALLS]f[ARGS]{...} or [TOOL_CALLS]f[CALL_ID]id[ARGS]{...}."""

    markers = ("[TOOL_CALLS]",)

    def read(self, start: int) -> Block:
        """The calls after the marker."""
        source = self.source
        pos = source.space(start + len(self.markers[0]))
        if source.char(pos) in "[{":
            return self.read_json(pos)
        name = _NAME.match(source.text, pos)
        if name is None:
            raise NotACallError
        pos = name.end()
        source.char(pos)  # the name may go on
        if name[0] not in self.functions:
            raise NotACallError
        if source.starts("[CALL_ID]", pos):
            pos = _ID.match(source.text, pos + len("[CALL_ID]")).end()  # type: ignore[union-attr]
        if source.starts("[ARGS]", pos):
            pos += len("[ARGS]")
        pos = source.space(pos)
        if source.char(pos) != "{":
            raise NotACallError
        arguments, end = self.argument_object(pos)
        return Block([ToolCall(name[0], arguments)], end)


_SPECIAL_TOKENS = ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]")

MISTRAL = ToolFormat(
    name="mistral",
    signs=(r"\[TOOL_CALLS\]",),
    parser=MistralParser,
    tags=lambda functions, parallel: json_list_tag(
        functions, parallel, begin="[TOOL_CALLS][", end="]"
    ),
    trigger="[TOOL_CALLS]",
    special_tokens=_SPECIAL_TOKENS,
    call_id=mistral_call_id,
)
MISTRAL_ARGS = ToolFormat(
    name="mistral-args",
    signs=(r"\[ARGS\]",),
    parser=MistralParser,
    tags=lambda functions, parallel: [
        {
            "type": "tag",
            "begin": f"[TOOL_CALLS]{f.name}[ARGS]",
            "content": {"type": "json_schema", "json_schema": f.schema},
            "end": "",
        }
        for f in functions
    ],
    trigger="[TOOL_CALLS]",
    special_tokens=_SPECIAL_TOKENS,
    call_id=mistral_call_id,
)
