"""Items of /v1/responses -> messages of a conversation."""

from collections.abc import Sequence
from typing import Any

from quatom.serving.responses_protocol import (
    Content,
    InputCall,
    InputCallOutput,
    InputItem,
    InputMessage,
    InputPart,
    InputReasoning,
    ResponsesRequest,
)

_INSTRUCTING = ("system", "developer")

Message = dict[str, Any]


def messages_of(body: ResponsesRequest) -> list[Message]:
    """The conversation of a request.

    What a model did in one turn is several items here and one message there: calls and reasoning
    join the assistant's message. Instructions join a system message that follows them, since
    templates know one at most.
    """
    messages = _joined(body.input)
    if body.instructions:
        first = {"role": "system", "content": body.instructions}
        if messages and messages[0]["role"] in _INSTRUCTING:
            given = messages.pop(0)
            first = {**given, "content": f"{body.instructions}\n\n{given['content']}"}
        messages.insert(0, first)
    return messages


def _joined(items: Sequence[InputItem]) -> list[Message]:
    messages: list[Message] = []

    def assistant(field: str) -> Message:
        """The assistant's message under way, if it may still get `field`."""
        if messages and messages[-1]["role"] == "assistant":
            last = messages[-1]
            may = {
                "reasoning_content": False,
                "content": not last["content"] and not last.get("tool_calls"),
                "tool_calls": True,
            }
            if may[field]:
                return last
        messages.append({"role": "assistant", "content": ""})
        return messages[-1]

    for item in items:
        match item:
            case InputMessage(role="assistant"):
                assistant("content")["content"] = _text(item.content)
            case InputMessage():
                messages.append({"role": item.role, "content": _text(item.content)})
            case InputCall():
                call = {
                    "id": item.call_id,
                    "type": "function",
                    "function": {"name": item.name, "arguments": item.arguments},
                }
                assistant("tool_calls").setdefault("tool_calls", []).append(call)
            case InputCallOutput():
                output = {"role": "tool", "tool_call_id": item.call_id}
                messages.append({**output, "content": _text(item.output)})
            case InputReasoning():
                reasoning = _text(item.content or item.summary or [])
                if reasoning:
                    assistant("reasoning_content")["reasoning_content"] = reasoning
    return messages


def _text(content: Content) -> str:
    if isinstance(content, str):
        return content
    parts: list[InputPart] = content
    return "".join(part.text or part.refusal or "" for part in parts)
