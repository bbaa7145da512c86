"""ToolFormat: how one family of models writes calls, as data."""

import re
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quatom.serving.tools.function import Function

if TYPE_CHECKING:
    from quatom.serving.tools.parser import CallParser

Grammar = dict[str, Any]
"""A node of a structural tag."""


def openai_call_id() -> str:
    """An id as OpenAI gives them."""
    return f"call_{uuid.uuid4().hex[:24]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFormat:
    """A format of calls: what it is known by, its parser and its grammar."""

    name: str
    signs: tuple[str, ...]
    """Regular expressions; a chat template that holds one of them has this format."""
    parser: "type[CallParser]"
    tags: Callable[[Iterable[Function], bool], list[Grammar]]
    """(functions, whether several may be called at once) -> tags, each for a call or a list."""
    separator: str = ""
    """Between two tags."""
    trigger: str = ""
    """What every tag begins with; empty: the whole answer is a call or text."""
    special_tokens: tuple[str, ...] = ()
    """Strings that may be special tokens and that the parser has to see."""
    call_id: Callable[[], str] = openai_call_id
    one_call: bool = False
    """An answer holds one call at most."""
    reasons: bool = False
    """The parser splits off reasoning itself."""
    lead: Grammar | None = None
    """What may come before a constrained answer: reasoning, if `reasons`."""
    content_begin: str = ""
    """What a constrained answer without calls begins with."""

    def is_in(self, template: str) -> bool:
        """Whether a chat template has this format."""
        return any(re.search(sign, template) for sign in self.signs)

    def content(self, grammar: Grammar) -> Grammar:
        """The grammar of an answer without calls that fits another grammar."""
        if not self.content_begin:
            return grammar
        begin = {"type": "const_string", "value": self.content_begin}
        return {"type": "sequence", "elements": [begin, grammar]}

    def led(self, grammar: Grammar) -> Grammar:
        """The grammar, and what may come before it."""
        if self.lead is None:
            return grammar
        with_lead = {"type": "sequence", "elements": [self.lead, grammar]}
        return {"type": "or", "elements": [with_lead, grammar]}

    def required(self, functions: Iterable[Function], parallel: bool) -> Grammar:
        """The grammar of an answer that is one or more calls."""
        parallel = parallel and not self.one_call
        return one_or_more(self.tags(functions, parallel), self.separator, parallel)

    def allowed(
        self, functions: Iterable[Function], parallel: bool, *, not_first: str = ""
    ) -> Grammar:
        """The grammar of text in which every call fits its schema.

        Args:
            functions: those that may be called.
            parallel: whether several may be called at once.
            not_first: a character that the text does not begin with.
        """
        parallel = parallel and not self.one_call
        tags = self.tags(functions, parallel)
        if not self.trigger:
            calls = one_or_more(tags, self.separator, parallel)
            marked: list[Grammar] = [
                {"type": "sequence", "elements": [{"type": "const_string", "value": m}, calls]}
                for m in self.parser.markers
            ]
            first = re.escape(self.parser.bare + not_first)
            plain = {"type": "regex", "pattern": rf"([^\s{first}](.|\n)*)?"}
            return {"type": "or", "elements": [calls, *marked, plain]}
        text: Grammar = {
            "type": "triggered_tags",
            "triggers": [self.trigger],
            "tags": tags,
            "at_least_one": False,
            "stop_after_first": not parallel,
        }
        if not not_first:
            return text
        other = {"type": "regex", "pattern": f"[^{re.escape(not_first)}]"}
        begun = {"type": "sequence", "elements": [other, text]}
        return {"type": "or", "elements": [begun, {**text, "at_least_one": True}]}


def one_or_more(tags: list[Grammar], separator: str, parallel: bool) -> Grammar:
    """The grammar of one tag, or of several one after the other."""
    return {
        "type": "tags_with_separator",
        "tags": tags,
        "separator": separator,
        "at_least_one": True,
        "stop_after_first": not parallel,
    }
