"""What all formats share: text with calls in it -> content and calls, as far as they are certain.

Each format says where a call may begin and reads calls from there. What can still become a call is
held back. Text that looked like a call and is none is content again, so nothing is lost. White
space beside a call belongs to the call.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

from quatom.serving.tools.function import Function
from quatom.serving.tools.partial_text import (
    NotACallError,
    PartialText,
    PendingError,
    held_back,
)


@dataclass(slots=True)
class ToolCall:
    """A call that is certain to be one; its arguments may still grow."""

    name: str
    arguments: str
    """JSON, or the beginning of it."""


@dataclass(slots=True)
class Parsed:
    """An answer as far as it is certain. A longer text only adds to it."""

    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    reasoning: str = ""


@dataclass(slots=True)
class Block:
    """Calls that come together."""

    calls: list[ToolCall]
    end: int | None
    """Position after the block; None: it goes on."""


class CallParser(ABC):
    """Parses one answer, again and again while it grows."""

    markers: tuple[str, ...] = ()
    """What a call begins with."""
    bare: str = ""
    """Characters that begin a call where they are the first of the answer."""

    def __init__(self, functions: Mapping[str, Function]) -> None:
        """Take the functions that may be called, by name."""
        self.functions = functions

    @abstractmethod
    def parse(self, text: str, *, final: bool, cut: bool = False) -> Parsed:
        """The answer so far.

        Args:
            text: all of it; it starts with what was given before.
            final: no more comes.
            cut: no more comes because a limit is reached: a half-written call is no content then.
        """


class BlockParser(CallParser):
    """For formats in which calls come between pieces of content."""

    def __init__(self, functions: Mapping[str, Function]) -> None:
        super().__init__(functions)
        self.source = PartialText()
        self._pos = 0  # what comes before is decided
        self._content = ""
        self._calls: list[ToolCall] = []

    @abstractmethod
    def read(self, start: int) -> Block:
        """The calls that begin at `start`.

        Raises:
            PendingError: there is not enough text to say.
            NotACallError: it is none.
        """

    def parse(self, text: str, *, final: bool, cut: bool = False) -> Parsed:
        """The answer so far."""
        self.source.update(text, final=final and not cut)
        while (found := self._find()) is not None:
            start, length = found
            before = text[self._pos : start]
            try:
                block = self.read(start)
            except PendingError:
                if not cut or text.startswith(self.markers, start):
                    return self._shown(before)
                self._decide(text[self._pos : start + length], start + length)
                continue
            except NotACallError:
                self._decide(text[self._pos : start + length], start + length)
                continue
            if block.end is None:
                shown = self._shown(before)
                return Parsed(shown.content, [*shown.calls, *block.calls])
            self._decide(before, block.end)
            self._calls += block.calls
        rest = text[self._pos :]
        if not final:
            return self._shown(rest[: len(rest) - held_back(rest, self.markers)])
        return self._shown(rest) if self._calls else Parsed(self._joined(rest))

    def _find(self) -> tuple[int, int] | None:
        """Where the next call may begin, and how long its marker is."""
        text, pos = self.source.text, self._pos
        if self.bare and not pos:
            first = self.source.space(0)
            if text[first : first + 1] and text[first] in self.bare:
                return first, 1
        found = [(at, len(m)) for m in self.markers if (at := text.find(m, pos)) >= 0]
        return min(found, default=None)

    def _decide(self, content: str, pos: int) -> None:
        self._content = self._joined(content)
        self._pos = pos

    def _joined(self, content: str) -> str:
        """With calls, content does not begin with white space: that was beside a call."""
        joined = self._content + content
        return joined.lstrip() if self._calls and not self._content.strip() else joined

    def _shown(self, content: str) -> Parsed:
        """White space at the end waits: it is dropped if a call follows."""
        return Parsed(self._joined(content).rstrip(), list(self._calls))
