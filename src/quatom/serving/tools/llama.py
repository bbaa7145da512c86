"""Llama 3.1 to 3.3: the answer is the call, a JSON object with `parameters`."""

from quatom.serving.tools.format import ToolFormat
from quatom.serving.tools.json_calls import JsonCallParser, json_call_tags


class LlamaParser(JsonCallParser):
    """{"name": "f", "parameters": {...}}, at the start of the answer or after <|python_tag|>."""

    markers = ("<|python_tag|>",)
    bare = "{["


LLAMA = ToolFormat(
    name="llama",
    signs=(r'"parameters": dictionary of argument name', r"<\|python_tag\|>"),
    parser=LlamaParser,
    tags=lambda functions, parallel: json_call_tags(functions, key="parameters"),
    separator="; ",
    special_tokens=("<|python_tag|>",),
)
