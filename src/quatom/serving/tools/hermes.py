"""Hermes, Qwen2.5, Qwen3 and Granite 4: JSON between <tool_call> tags."""

from quatom.serving.tools.format import ToolFormat
from quatom.serving.tools.json_calls import JsonCallParser, json_call_tags


class HermesParser(JsonCallParser):
    """<tool_call>{"name": "f", "arguments": {...}}</tool_call>, once for each call."""

    markers = ("<tool_call>",)
    end_markers = ("</tool_call>",)


HERMES = ToolFormat(
    name="hermes",
    signs=("<tool_call>",),
    parser=HermesParser,
    tags=lambda functions, parallel: json_call_tags(
        functions, begin="<tool_call>\n", end="\n</tool_call>"
    ),
    separator="\n",
    trigger="<tool_call>",
    special_tokens=("<tool_call>", "</tool_call>"),
)
