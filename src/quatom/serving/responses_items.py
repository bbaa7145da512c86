"""What /v1/responses answers: items, and the events by which a stream builds them."""

import copy
import uuid
from typing import Any

from quatom.serving.answer import AnswerDelta

Item = dict[str, Any]
Event = dict[str, Any]

_TEXT = {"reasoning": "reasoning_text", "message": "output_text"}


class ItemWriter:
    """Writes the items of one answer, one after the other."""

    def __init__(self) -> None:
        self.items: list[Item] = []
        self._open = False
        self._call = -1

    def add(self, delta: AnswerDelta) -> list[Event]:
        """Append what is new of an answer."""
        events: list[Event] = []
        if delta.reasoning:
            events += self._text("reasoning", delta.reasoning)
        if delta.content:
            events += self._text("message", delta.content)
        for call in delta.calls:
            if call.name is not None:
                item = {
                    "type": "function_call",
                    "id": f"fc_{uuid.uuid4().hex}",
                    "call_id": call.id,
                    "name": call.name,
                    "arguments": "",
                    "status": "in_progress",
                }
                events += self._begin(item)
            self.items[-1]["arguments"] += call.arguments
            if call.arguments:
                name = "response.function_call_arguments.delta"
                events.append(self._event(name, delta=call.arguments))
        return events

    def finish(self, *, complete: bool) -> list[Event]:
        """No more comes; `complete`: the answer was not cut off."""
        events = [] if self.items else self._text("message", "")
        return events + self._end("completed" if complete else "incomplete")

    def _text(self, kind: str, text: str) -> list[Event]:
        events: list[Event] = []
        if not self._open or self.items[-1]["type"] != kind:
            part = {"type": _TEXT[kind], "text": ""}
            if kind == "message":
                part |= {"annotations": [], "logprobs": []}  # type: ignore[dict-item]
            item: Item = {
                "type": kind,
                "id": f"{'msg' if kind == 'message' else 'rs'}_{uuid.uuid4().hex}",
                "status": "in_progress",
            }
            own: Item = {"role": "assistant"} if kind == "message" else {"summary": []}
            item |= own
            events += self._begin({**item, "content": []})
            added = self._event("response.content_part.added", content_index=0, part=dict(part))
            self.items[-1]["content"].append(part)
            events.append(added)
        self.items[-1]["content"][0]["text"] += text
        events.append(self._text_event("delta", delta=text))
        return events

    def _text_event(self, step: str, **fields: Any) -> Event:
        item = self.items[-1]
        if item["type"] == "message":
            fields["logprobs"] = []
        return self._event(f"response.{_TEXT[item['type']]}.{step}", content_index=0, **fields)

    def _begin(self, item: Item) -> list[Event]:
        events = self._end("completed")
        self.items.append(item)
        self._open = True
        event = {"type": "response.output_item.added", "output_index": len(self.items) - 1}
        return [*events, {**event, "item": copy.deepcopy(item)}]

    def _end(self, status: str) -> list[Event]:
        if not self._open:
            return []
        self._open = False
        item = self.items[-1]
        item["status"] = status
        if item["type"] == "function_call":
            name = "response.function_call_arguments.done"
            events = [self._event(name, name=item["name"], arguments=item["arguments"])]
        else:
            part = item["content"][0]
            events = [
                self._text_event("done", text=part["text"]),
                self._event("response.content_part.done", content_index=0, part=part),
            ]
        done = {"type": "response.output_item.done", "output_index": len(self.items) - 1}
        return [*events, {**done, "item": item}]

    def _event(self, kind: str, **fields: Any) -> Event:
        index = len(self.items) - 1
        return {"type": kind, "item_id": self.items[-1]["id"], "output_index": index, **fields}
