"""Answer: the text of one completion as reasoning, content and calls, and what is new of each."""

from collections.abc import Callable
from dataclasses import dataclass, field

from quatom.serving.reasoning import ReasoningTags, Start
from quatom.serving.tools.parser import CallParser, Parsed


@dataclass(frozen=True, slots=True)
class CallDelta:
    """What is new of one call."""

    index: int
    id: str
    name: str | None
    """None: it was given before."""
    arguments: str


@dataclass(frozen=True, slots=True)
class AnswerDelta:
    """What is new of an answer."""

    reasoning: str = ""
    content: str = ""
    calls: list[CallDelta] = field(default_factory=list)

    def __bool__(self) -> bool:
        """Whether there is anything."""
        return bool(self.reasoning or self.content or self.calls)


class Answer:
    """One completion. The deltas' texts join to those of `parsed`, however the text was cut."""

    def __init__(
        self,
        *,
        reasoning: ReasoningTags | None = None,
        start: Start = Start.CLOSED,
        parser: CallParser | None = None,
        call_id: Callable[[], str] = str,
        parallel: bool = True,
    ) -> None:
        """Begin an answer.

        Args:
            reasoning: tags to split by; None: none.
            start: how the answer begins.
            parser: finds calls; None: everything is content.
            call_id: makes ids.
            parallel: False: calls after the first one are dropped.
        """
        self.parsed = Parsed()
        self.call_ids: list[str] = []
        self._reasoning = reasoning
        self._start = start
        self._parser = parser
        self._call_id = call_id
        self._parallel = parallel
        self._text = ""

    def add(self, text: str, *, finish_reason: str | None = None) -> AnswerDelta:
        """Append text; with a reason it is the last."""
        self._text += text
        if self._reasoning is None and self._parser is None:
            self.parsed.content = self._text
            return AnswerDelta(content=text)
        before, now = self.parsed, self._parse(finish_reason)
        self.parsed = now
        calls = []
        # Of the calls that are known only the last one grows.
        for index in range(max(0, len(before.calls) - 1), len(now.calls)):
            call, known = now.calls[index], index < len(before.calls)
            if not known:
                self.call_ids.append(self._call_id())
            sent = len(before.calls[index].arguments) if known else 0
            if not known or sent < len(call.arguments):
                name, arguments = None if known else call.name, call.arguments[sent:]
                calls.append(CallDelta(index, self.call_ids[index], name, arguments))
        return AnswerDelta(
            now.reasoning[len(before.reasoning) :], now.content[len(before.content) :], calls
        )

    def finish_reason(self, reason: str | None) -> str | None:
        """OpenAI's reason: an answer that ends with calls says so."""
        return "tool_calls" if reason == "stop" and self.parsed.calls else reason

    def _parse(self, finish_reason: str | None) -> Parsed:
        final = finish_reason is not None
        reasoning, rest = "", self._text
        if self._reasoning is not None:
            reasoning, rest = self._reasoning.split(self._text, self._start, final=final)
        if self._parser is None:
            return Parsed(content=rest, reasoning=reasoning)
        parsed = self._parser.parse(rest, final=final, cut=finish_reason == "length")
        parsed.reasoning += reasoning
        if not self._parallel:
            del parsed.calls[1:]
        return parsed
