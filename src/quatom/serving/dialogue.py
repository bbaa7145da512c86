"""Dialogue: how one model converses. A conversation in, a prompt and a plan for its answer out."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from quatom.engine.sampling import StructuredOutput
from quatom.engine.vocabulary import vocabulary_of
from quatom.errors import RequestError
from quatom.serving.answer import Answer
from quatom.serving.chat_template import ChatTemplate, Message
from quatom.serving.reasoning import (
    ReasoningTags,
    Start,
    check_reasoning_format,
    reasoning_tags,
)
from quatom.serving.tools.choice import ToolUse
from quatom.serving.tools.format import Grammar, ToolFormat
from quatom.serving.tools.function import Function
from quatom.serving.tools.registry import FORMATS, detect, format_named


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A conversation, and what its answer may be."""

    messages: Sequence[Message]
    tools: list[dict[str, Any]] | None = None
    """What the template is told, in OpenAI's form."""
    functions: dict[str, Function] = field(default_factory=dict)
    """Those of the tools that may be called; empty: calls are not looked for."""
    call_required: bool = False
    parallel: bool | None = None
    """None: as the model can."""
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)
    """Variables of the template."""
    structured: StructuredOutput | None = None
    """What the content must fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A prompt, and how its answer is generated and read."""

    prompt: str
    structured: StructuredOutput | None
    shown_tokens: tuple[int, ...]
    """Special tokens that must stay in the text."""
    reasoning: ReasoningTags | None
    start: Start
    tool_format: ToolFormat | None
    functions: dict[str, Function]
    parallel: bool

    def answer(self) -> Answer:
        """A new answer; each of n completions has its own."""
        known = self.tool_format
        return Answer(
            reasoning=self.reasoning,
            start=self.start,
            parser=None if known is None else known.parser(self.functions),
            call_id=str if known is None else known.call_id,
            parallel=self.parallel,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DialogueStyle:
    """What is said about a model's way to converse, in the place of what its template shows."""

    chat_template: str | None = None
    """Text of a Jinja template; None: the tokenizer's own."""
    tool_format: str | None = None
    """Name of the format of calls; None: as the template shows."""
    reasoning_format: str = "auto"
    """See `quatom.serving.reasoning.FORMATS`."""


class Dialogue:
    """A tokenizer's chat template, its tool format and its reasoning. Any thread may use it."""

    def __init__(self, tokenizer: Any, style: DialogueStyle = DialogueStyle()) -> None:
        """Take a tokenizer, with a chat template or without.

        Raises:
            RequestError: a format is not known.
        """
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer, style.chat_template)
        self._given = None if style.tool_format is None else format_named(style.tool_format)
        self._reasoning_format = check_reasoning_format(style.reasoning_format)

    @cached_property
    def reasoning(self) -> ReasoningTags | None:
        """The tags that answers are split by, if any."""
        return reasoning_tags(self._reasoning_format, self._template.text(tools=True))

    @cached_property
    def tool_format(self) -> ToolFormat | None:
        """The format of calls, if it is known."""
        return self._given or detect(self._template.text(tools=True))

    def prompt(self, turn: Turn) -> str:
        """The text that a turn is for the model.

        Raises:
            ApiError: see `ChatTemplate.render`.
        """
        begins = turn.add_generation_prompt
        return self._template.render(
            turn.messages,
            tools=turn.tools,
            add_generation_prompt=not turn.continue_final_message if begins is None else begins,
            continue_final_message=turn.continue_final_message,
            arguments=turn.arguments,
        )

    def plan(self, turn: Turn) -> Plan:
        """The prompt of a turn, and how its answer is generated and read.

        Raises:
            ApiError: see `ChatTemplate.render`.
            RequestError: the model's calls cannot be read, or what must be called not enforced.
        """
        use = self._tool_use(turn)
        prompt = self.prompt(turn)
        known = self.tool_format
        if use is None and not (known is not None and known.reasons):
            known = None
        reasoning = None if known is not None and known.reasons else self.reasoning
        start = Start.CLOSED
        if reasoning is not None:
            continued = turn.messages[-1]["content"] if turn.continue_final_message else None
            start = reasoning.start(prompt, continued)
        tokens = () if known is None else known.special_tokens
        if reasoning is not None:
            tokens = (*tokens, reasoning.begin, reasoning.end)
        return Plan(
            prompt=prompt,
            structured=_structured(turn.structured, use, known, reasoning, start),
            shown_tokens=self._ids(tokens),
            reasoning=reasoning,
            start=start,
            tool_format=known,
            functions=turn.functions,
            parallel=use is None or use.parallel,
        )

    def _tool_use(self, turn: Turn) -> ToolUse | None:
        if not turn.functions:
            return None
        known = self.tool_format
        if known is None:
            looked_for = ", ".join(f"{f.signs[0]} ({f.name})" for f in FORMATS)
            raise RequestError(
                "this model's chat template shows none of the tool-call formats that this server "
                f"reads; it was searched for {looked_for}. Start the server with --tool-format if "
                "you know the model's, or send tool_choice: none"
            )
        parallel = turn.parallel
        if parallel is None:
            parallel = not self._template.one_call_at_a_time
        return ToolUse(known, turn.functions, turn.call_required, parallel)

    def _ids(self, strings: tuple[str, ...]) -> tuple[int, ...]:
        special = vocabulary_of(self._tokenizer).special_ids
        return tuple(special[s] for s in strings if s in special)


def _structured(
    content: StructuredOutput | None,
    use: ToolUse | None,
    known: ToolFormat | None,
    reasoning: ReasoningTags | None,
    start: Start,
) -> StructuredOutput | None:
    """The constraint of a whole answer: reasoning is free, what follows is not."""
    if use is None and (content is None or (known is None and start is Start.CLOSED)):
        return content
    plain = None if content is None else as_grammar(content)
    if use is not None:
        grammar = use.grammar(plain)
    elif known is not None and plain is not None:
        grammar = known.led(known.content(plain))
    else:
        grammar = plain
    if grammar is None:
        return None
    if reasoning is not None:
        alone = grammar if use is None else use.grammar(plain, not_first=reasoning.begin[0])
        assert alone is not None
        grammar = reasoning.before(grammar, start, alone=alone)
    tag = {"type": "structural_tag", "format": grammar}
    return StructuredOutput("structural_tag", json.dumps(tag))


def as_grammar(wanted: StructuredOutput) -> Grammar:
    """A constraint as a node of a structural tag.

    Raises:
        RequestError: it is a structural tag of the older kind.
    """
    match wanted.kind:
        case "json_schema":
            return {"type": "json_schema", "json_schema": json.loads(wanted.value)}
        case "json_object":
            return {"type": "json_schema", "json_schema": {"type": "object"}}
        case "regex":
            return {"type": "regex", "pattern": wanted.value}
        case "grammar":
            return {"type": "grammar", "grammar": wanted.value}
        case "choice":
            values = [{"type": "const_string", "value": v} for v in json.loads(wanted.value)]
            return {"type": "or", "elements": values}
    form = json.loads(wanted.value).get("format")
    if form is None:
        raise RequestError(
            "a structural tag of structures and triggers cannot be combined with tools or "
            "reasoning: give it as a format"
        )
    return dict(form)
