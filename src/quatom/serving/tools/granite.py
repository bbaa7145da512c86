"""Granite 3: a list of JSON calls after <|tool_call|>."""

from quatom.serving.tools.format import ToolFormat
from quatom.serving.tools.json_calls import JsonCallParser, json_list_tag


class GraniteParser(JsonCallParser):
    """<|tool_call|>[{"name": "f", "arguments": {...}}, ...]."""

    markers = ("<|tool_call|>", "<tool_call>")
    end_markers = ("</tool_call>",)


GRANITE = ToolFormat(
    name="granite",
    signs=(r"<\|tool_call\|>",),
    parser=GraniteParser,
    tags=lambda functions, parallel: json_list_tag(
        functions, parallel, begin="<|tool_call|>[", end="]"
    ),
    trigger="<|tool_call|>",
    special_tokens=("<|tool_call|>", "<tool_call>", "</tool_call>"),
)
