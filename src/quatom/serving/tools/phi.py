"""Phi-4: a list of JSON calls, after <|tool_call|> or after the word functools."""

from quatom.serving.tools.format import ToolFormat
from quatom.serving.tools.json_calls import JsonCallParser, json_list_tag


class PhiParser(JsonCallParser):
    """<|tool_call|>[{...}, ...]<|/tool_call|>, or functools[{...}, ...]."""

    markers = ("<|tool_call|>", "functools")
    end_markers = ("<|/tool_call|>",)


_SPECIAL_TOKENS = ("<|tool_call|>", "<|/tool_call|>")

FUNCTOOLS = ToolFormat(
    name="phi-functools",
    signs=("functools",),
    parser=PhiParser,
    tags=lambda functions, parallel: json_list_tag(
        functions, parallel, begin="functools[", end="]"
    ),
    trigger="functools",
    special_tokens=_SPECIAL_TOKENS,
)
PHI = ToolFormat(
    name="phi",
    signs=(r"<\|/tool_call\|>", r"<\|tool\|>"),
    parser=PhiParser,
    tags=lambda functions, parallel: json_list_tag(
        functions, parallel, begin="<|tool_call|>[", end="]<|/tool_call|>"
    ),
    trigger="<|tool_call|>",
    special_tokens=_SPECIAL_TOKENS,
)
