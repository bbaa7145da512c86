"""Text that is still being written: what can be said of it, and what must wait.

Readers raise `Pending` where more text may decide, and `NotACallError` where no text can make a
call of it any more. Once the text is final nothing is pending.
"""

import re

_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[{}\[\]]|[\s,:0-9eE+\-.truefalsn]+', re.DOTALL)
_SCALAR = re.compile(r"[^\s,}\]]*")
_SPACE = re.compile(r"\s*")
_CLOSES = {"{": "}", "[": "]"}


class PendingError(Exception):
    """More text decides."""


class NotACallError(Exception):
    """Whatever follows, this is no call."""


class JsonScan:
    """Finds the end of one JSON value; text that it has read is not read again."""

    __slots__ = ("_brackets", "_pos", "broken", "end", "start")

    def __init__(self, start: int) -> None:
        self.start = start
        self.end: int | None = None
        """Position after the value, once it is complete."""
        self.broken: int | None = None
        """Position of the first character that JSON does not allow there."""
        self._pos = start
        self._brackets: list[str] = []

    def advance(self, text: str, *, final: bool) -> None:
        """Go on in `text`, which starts with what was given before."""
        if self.end is None and self.broken is None and self.start < len(text):
            if text[self.start] in '{["':
                self._advance(text)
            else:
                end = _SCALAR.match(text, self.start).end()  # type: ignore[union-attr]
                if end < len(text) or final:
                    self.end = end

    def _advance(self, text: str) -> None:
        while token := _TOKEN.match(text, self._pos):
            first = token[0][0]
            if first in _CLOSES:
                self._brackets.append(_CLOSES[first])
            elif first in "}]" and self._brackets.pop() != first:
                break
            self._pos = token.end()
            if not self._brackets:
                self.end = self._pos
                return
        # A quote that is not closed yet is read again; anything else will not become JSON.
        if self._pos < len(text) and text[self._pos] != '"':
            self.broken = self._pos


class PartialText:
    """The text of one answer so far."""

    def __init__(self) -> None:
        self.text = ""
        self.final = False
        self._scans: dict[int, JsonScan] = {}

    def update(self, text: str, *, final: bool) -> None:
        """Set the text, which starts with what it was before."""
        self.text = text
        self.final = final

    def wait(self) -> None:
        """Give up here until there is more text.

        Raises:
            PendingError: more text may come.
            NotACallError: no more text will.
        """
        raise NotACallError if self.final else PendingError

    def space(self, pos: int) -> int:
        """Position after white space."""
        return _SPACE.match(self.text, pos).end()  # type: ignore[union-attr]

    def char(self, pos: int) -> str:
        """The character there; waits for it."""
        if pos >= len(self.text):
            self.wait()
        return self.text[pos]

    def starts(self, literal: str, pos: int) -> bool:
        """Whether `literal` stands there; waits while it may."""
        if self.text.startswith(literal, pos):
            return True
        rest = self.text[pos : pos + len(literal)]
        if not self.final and len(rest) < len(literal) and literal.startswith(rest):
            raise PendingError
        return False

    def expect(self, literal: str, pos: int) -> int:
        """Position after `literal`, which must stand there."""
        if not self.starts(literal, pos):
            raise NotACallError
        return pos + len(literal)

    def find(self, literal: str, pos: int) -> int:
        """Position of `literal` at or after `pos`; waits for it."""
        found = self.text.find(literal, pos)
        if found < 0:
            self.wait()
        return found

    def scan(self, start: int) -> JsonScan:
        """The JSON value that starts there, as far as it goes."""
        scan = self._scans.setdefault(start, JsonScan(start))
        scan.advance(self.text, final=self.final)
        return scan

    def value(self, start: int) -> int:
        """Position after the JSON value that starts there; waits for it."""
        scan = self.scan(start)
        if scan.broken is not None:
            raise NotACallError
        if scan.end is None:
            self.wait()
        assert scan.end is not None
        return scan.end


def held_back(text: str, markers: tuple[str, ...]) -> int:
    """Length of the longest end of `text` that may become one of `markers`."""
    for length in range(min(max(map(len, markers), default=1) - 1, len(text)), 0, -1):
        end = text[len(text) - length :]
        if any(marker.startswith(end) for marker in markers):
            return length
    return 0
