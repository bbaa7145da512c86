"""Reasoning: what a model writes between its reasoning tags, apart from its answer.

A model reasons if its chat template shows a pair of tags. Whether reasoning has begun, the end of
the prompt says: some templates open the tag themselves, others leave that to the model, and some
close it at once to switch reasoning off.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Any

from quatom.errors import RequestError

Grammar = dict[str, Any]

_TAGS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"))
FORMATS = ("auto", "none", "deepseek")
"""auto: by the chat template; none: reasoning stays in the content; deepseek: <think> tags whatever
the template says, and an answer begins with reasoning even where no tag opens it."""


class Start(Enum):
    """How an answer begins."""

    OPEN = "inside of reasoning"
    MAYBE = "with the opening tag, or without reasoning"
    CLOSED = "without reasoning: the prompt has closed it"


@dataclass(frozen=True, slots=True)
class ReasoningTags:
    """A pair of tags."""

    begin: str
    end: str
    always: bool = False
    """Every answer begins inside of reasoning."""

    def start(self, prompt: str, continued: str | None) -> Start:
        """How the answer to a prompt begins.

        Args:
            prompt: the rendered conversation.
            continued: content of the message that the answer continues.
        """
        if continued is not None:
            is_open = continued.rfind(self.begin) > continued.rfind(self.end)
            return Start.OPEN if is_open else Start.CLOSED
        prompt = prompt.rstrip()
        if prompt.endswith(self.end):
            return Start.CLOSED
        return Start.OPEN if self.always or prompt.endswith(self.begin) else Start.MAYBE

    def split(self, text: str, start: Start, *, final: bool) -> tuple[str, str]:
        """Reasoning and what follows it, as far as they are certain."""
        begin = 0
        stripped = len(text) - len(text.lstrip())
        if text.startswith(self.begin, stripped):
            begin = stripped + len(self.begin)
        elif not final and self.begin.startswith(text[stripped:]):
            return "", ""  # it may become the opening tag
        elif start is not Start.OPEN:
            return "", text
        end = text.find(self.end, begin)
        if end >= 0:
            return text[begin:end].strip(), text[end + len(self.end) :].lstrip()
        reasoning = text[begin:]
        if not final:
            reasoning = reasoning[: len(reasoning) - _held_back(reasoning, self.end)]
        return reasoning.strip(), ""

    def before(self, grammar: Grammar, start: Start, *, alone: Grammar) -> Grammar:
        """A structural tag's grammar that constrains what follows the reasoning.

        Args:
            grammar: of what follows.
            start: how the answer begins.
            alone: of an answer without reasoning. It does not allow the opening tag: a parser
                could not tell the two apart.
        """
        if start is Start.CLOSED:
            return grammar
        space = {"type": "regex", "pattern": r"[ \n]{0,4}"}

        def tag(begin: str) -> Grammar:
            any_text = {"type": "any_text"}
            return {"type": "tag", "begin": begin, "content": any_text, "end": self.end}

        if start is Start.OPEN:
            return {"type": "sequence", "elements": [tag(""), space, grammar]}
        reasoned = {"type": "sequence", "elements": [tag(self.begin), space, grammar]}
        return {"type": "or", "elements": [reasoned, alone]}


def _held_back(text: str, end: str) -> int:
    return next((n for n in range(len(end) - 1, 0, -1) if text.endswith(end[:n])), 0)


def check_reasoning_format(name: str) -> str:
    """The name.

    Raises:
        RequestError: there is no such format.
    """
    if name not in FORMATS:
        raise RequestError(f"no reasoning format is named {name!r}; there are {', '.join(FORMATS)}")
    return name


def reasoning_tags(reasoning_format: str, template: str) -> ReasoningTags | None:
    """The tags that answers are split by, if any.

    Args:
        reasoning_format: one of FORMATS.
        template: the chat template's text.
    """
    if reasoning_format == "none":
        return None
    for begin, end in _TAGS:
        if end in template:
            return ReasoningTags(begin, end, always=reasoning_format == "deepseek")
    return ReasoningTags(*_TAGS[0], always=True) if reasoning_format == "deepseek" else None
