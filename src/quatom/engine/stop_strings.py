"""StopFinder: the search for stop strings, in text that arrives in pieces.

A stop string is looked for in the text as it is shown. If it holds special tokens and those are
left out of the text, it is looked for in the text with them: each hidden special token leaves a
mark there, one lone surrogate, which no decoded text can hold.
"""

import re
from collections.abc import Collection, Sequence

from quatom.engine.vocabulary import Vocabulary

_FIRST_MARK, _OTHER_MARK = 0xD800, "\udfff"
_MARK = re.compile("[\ud800-\udfff]")


class _Patterns:
    """Strings to look for at once, each with the stop string that it stands for."""

    def __init__(self, patterns: dict[str, str]) -> None:
        self._patterns = patterns  # pattern: stop string
        self._longest = max(map(len, patterns), default=0)
        # Whatever starts a pattern without being one ends in one of these.
        self._inner = {char for pattern in patterns for char in pattern[:-1]}

    def __bool__(self) -> bool:
        return bool(self._patterns)

    def find(self, text: str) -> list[tuple[int, str]]:
        """(place of the first occurrence, stop string) of the patterns that occur."""
        places = ((text.find(pattern), stop) for pattern, stop in self._patterns.items())
        return [(at, stop) for at, stop in places if at >= 0]

    def open_from(self, text: str) -> int:
        """Where the longest end of `text` begins that starts a pattern."""
        if text[-1:] in self._inner:
            for start in range(max(len(text) - self._longest + 1, 0), len(text)):
                end = text[start:]
                if any(pattern.startswith(end) for pattern in self._patterns):
                    return start
        return len(text)


class StopFinder:
    """Finds stop strings in one sequence's text, and holds back what may become one."""

    def __init__(
        self, stops: Sequence[str], vocabulary: Vocabulary, *, hidden: Collection[int] = ()
    ) -> None:
        """Prepare the search.

        Args:
            stops: strings to find.
            vocabulary: of the text.
            hidden: special tokens that are left out of the text.
        """
        self._marks: dict[int, str] = {}
        names = vocabulary.special_ids if hidden and stops else {}
        names = {string: token_id for string, token_id in names.items() if token_id in hidden}
        pattern_of = {stop: self._mark_specials(stop, names) for stop in stops}
        self._plain = _Patterns({p: stop for stop, p in pattern_of.items() if p == stop})
        self._marked = _Patterns({p: stop for stop, p in pattern_of.items() if p != stop})
        self._held = ""  # marks included

    def mark(self, token_id: int) -> str:
        """What stands for a hidden special token in the text that is searched."""
        return self._marks.get(token_id, _OTHER_MARK) if self._marked else ""

    def push(self, new: str, *, find: bool = True) -> tuple[str, str | None]:
        """Text that no stop string can be in, and the stop string found right after it."""
        if not self._plain and not self._marked:
            return new, None
        text = self._held + new
        everywhere: Sequence[int] = range(len(text) + 1)
        shown, places = text, everywhere
        if self._marked and (marks := {match.start() for match in _MARK.finditer(text)}):
            shown, places = _MARK.sub("", text), [i for i in everywhere if i not in marks]
        # (patterns, the text to search, where its characters are in `text`)
        searches = [(self._plain, shown, places), (self._marked, text, everywhere)]
        hits = [
            (where[at], stop)
            for patterns, searched, where in searches
            for at, stop in (patterns.find(searched) if find else ())
        ]
        if hits:
            cut, stop = min(hits)
            self._held = ""
            return _MARK.sub("", text[:cut]), stop
        cut = min(where[patterns.open_from(searched)] for patterns, searched, where in searches)
        self._held = text[cut:]
        return _MARK.sub("", text[:cut]), None

    def drain(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held = _MARK.sub("", self._held), ""
        return held

    def _mark_specials(self, stop: str, hidden: dict[str, int]) -> str:
        """A stop string with a mark for each special token in it, the longest ones first."""
        found = sorted((s for s in hidden if s and s in stop), key=len, reverse=True)
        if not found:
            return stop

        def mark_of(match: "re.Match[str]") -> str:
            return self._marks.setdefault(hidden[match[0]], chr(_FIRST_MARK + len(self._marks)))

        return re.sub("|".join(map(re.escape, found)), mark_of, stop)
