"""Text that is still being written: what can be said of it, and what must wait.

Readers raise `Pending` where more text may decide, and `NotACallError` where no text can make a
call of it any more. Once the text is final nothing is pending.
"""

import re
from dataclasses import dataclass

_IN_STRING = {
    quote: re.compile(rf"[^{quote}\\]*(?:\\.[^{quote}\\]*)*", re.DOTALL) for quote in "\"'"
}
_SCALAR = re.compile(r"[^\s,}\]]*")
_SPACE = re.compile(r"\s*")
_CLOSES = {"{": "}", "[": "]", "(": ")"}


class PendingError(Exception):
    """More text decides."""


class NotACallError(Exception):
    """Whatever follows, this is no call."""


@dataclass(frozen=True, slots=True)
class Syntax:
    """What brackets and strings look like."""

    brackets: str
    quotes: str
    between: "re.Pattern[str]"
    """A run of anything that may come with them."""


JSON = Syntax("{}[]", '"', re.compile(r"[\s,:0-9eE+\-.truefalsn]+"))
PYTHON = Syntax("{}[]()", "\"'", re.compile(r"[^{}\[\]()\"']+"))


class Scan:
    """Finds the end of one value; text that it has read is not read again."""

    def __init__(self, start: int, syntax: Syntax = JSON) -> None:
        self.end: int | None = None
        """Position after the value, once it is complete."""
        self.broken: int | None = None
        """Position of the first character that the syntax does not allow there."""
        self._syntax = syntax
        self._pos = start
        self._brackets: list[str] = []
        self._quote = ""  # of the string that is open

    def advance(self, text: str, *, final: bool) -> None:
        """Go on in `text`, which starts with what was given before."""
        while self.end is None and self.broken is None and self._pos < len(text):
            if self._quote:
                self._pos = _IN_STRING[self._quote].match(text, self._pos).end()  # type: ignore[union-attr]
                if not text.startswith(self._quote, self._pos):
                    return  # the string goes on, or its last backslash waits for what it escapes
                self._quote = ""
                self._close(self._pos + 1)
            elif not self._brackets and text[self._pos] not in '{["(':
                end = _SCALAR.match(text, self._pos).end()  # type: ignore[union-attr]
                if end == len(text) and not final:
                    return
                self.end = end
            else:
                self._step(text)

    def _step(self, text: str) -> None:
        char = text[self._pos]
        if char in self._syntax.quotes:
            self._quote = char
            self._pos += 1
        elif char not in self._syntax.brackets:
            between = self._syntax.between.match(text, self._pos)
            if between is None:
                self.broken = self._pos
            else:
                self._pos = between.end()
        elif char in _CLOSES:
            self._brackets.append(_CLOSES[char])
            self._pos += 1
        elif self._brackets[-1] == char:
            self._brackets.pop()
            self._close(self._pos + 1)
        else:
            self.broken = self._pos

    def _close(self, pos: int) -> None:
        self._pos = pos
        if not self._brackets:
            self.end = pos


class PartialText:
    """The text of one answer so far."""

    def __init__(self) -> None:
        self.text = ""
        self.final = False
        self._scans: dict[int, Scan] = {}

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
        """Whether `literal` is there; waits while it may."""
        if self.text.startswith(literal, pos):
            return True
        rest = self.text[pos : pos + len(literal)]
        if not self.final and len(rest) < len(literal) and literal.startswith(rest):
            raise PendingError
        return False

    def expect(self, literal: str, pos: int) -> int:
        """Position after `literal`, which must be there."""
        if not self.starts(literal, pos):
            raise NotACallError
        return pos + len(literal)

    def find(self, literal: str, pos: int) -> int:
        """Position of `literal` at or after `pos`; waits for it."""
        found = self.text.find(literal, pos)
        if found < 0:
            self.wait()
        return found

    def scan(self, start: int, syntax: Syntax = JSON) -> Scan:
        """The value that starts there, as far as it goes."""
        scan = self._scans.setdefault(start, Scan(start, syntax))
        scan.advance(self.text, final=self.final)
        return scan

    def value(self, start: int, syntax: Syntax = JSON) -> int:
        """Position after the value that starts there; waits for it."""
        scan = self.scan(start, syntax)
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
