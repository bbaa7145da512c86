"""Structural tags: free text with enforced pieces, in the form of xgrammar and vLLM, as Lark.

A format becomes an expression of llguidance's Lark dialect. Schemas and grammars inside of it
become grammars of their own, which the expression refers to as `@name`. What a regular expression
can say is kept as one, because the parser never splits a lexeme: `[a-z]+` and then `x` as two
lexemes would have no end.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from quatom.engine.structured.pattern import ANYTHING, rust_literal, rust_match
from quatom.errors import RequestError

MAX_DEPTH = 30


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of the grammar."""

    text: str
    """A Rust expression, or an expression of Lark."""
    regular: bool = False
    open: bool = False
    """It ends where the text ends: nothing can follow."""


@dataclass(slots=True)
class TagGrammar:
    """Builds one Lark grammar from a structural tag."""

    special_tokens: Mapping[str, int]
    """Special tokens of the tokenizer, which literals may name."""
    add_schema: Callable[[Any, str], str]
    """(schema, JSON path) -> name of its grammar."""
    add_grammar: Callable[[str], str]
    """Lark or GBNF -> name of its grammar."""
    rules: list[str] = field(default_factory=list)

    def lark(self, tag: Any) -> str:
        """The whole grammar.

        Raises:
            RequestError: the tag has a field or a format that is not known, or does not fit.
        """
        _check_object(tag, "$", {"type"}, {"format", "structures", "triggers"})
        if tag["type"] != "structural_tag":
            raise RequestError(f"$.type: must be 'structural_tag', got {tag['type']!r}")
        if "format" in tag:
            if "structures" in tag or "triggers" in tag:
                raise RequestError("$: give either format, or structures and triggers")
            part = self._format(tag["format"], "$.format", 0)
        else:
            part = self._old_form(tag)
        return f"start: {self._lark(part)}\n" + "".join(rule + "\n" for rule in self.rules)

    def _old_form(self, tag: Any) -> Part:
        _check_object(tag, "$", {"type", "structures", "triggers"}, set())
        tags = []
        for i, structure in enumerate(_list(tag["structures"], "$.structures")):
            _check_object(structure, f"$.structures[{i}]", {"begin", "end"}, {"schema"})
            content = {"type": "json_schema", "json_schema": structure.get("schema", {})}
            tags.append({"type": "tag", **structure, "content": content})
            tags[-1].pop("schema", None)
        wanted = {"type": "triggered_tags", "triggers": tag["triggers"], "tags": tags}
        return self._triggered_tags(wanted, "$", 0)

    def _format(self, given: Any, path: str, depth: int) -> Part:
        if depth > MAX_DEPTH:
            raise RequestError(f"{path}: formats are nested more than {MAX_DEPTH} deep")
        kind = given.get("type") if isinstance(given, dict) else None
        if not isinstance(kind, str) or kind not in FORMATS:
            raise RequestError(
                f"{path}.type: the format {kind!r} is not supported; these are: "
                f"{', '.join(FORMATS)}"
            )
        required, optional, build = FORMATS[kind]
        _check_object(given, path, {"type", *required}, optional)
        return build(self, given, path, depth + 1)

    def _const_string(self, given: Any, path: str, depth: int) -> Part:
        return self._literal(given["value"], f"{path}.value")

    def _regex(self, given: Any, path: str, depth: int) -> Part:
        try:
            return Part(f"(?:{rust_match(_text(given['pattern'], path))})", regular=True)
        except RequestError as error:
            raise RequestError(f"{path}.pattern: {error}") from error

    def _json_schema(self, given: Any, path: str, depth: int) -> Part:
        return Part("@" + self.add_schema(given["json_schema"], f"{path}.json_schema"))

    def _grammar(self, given: Any, path: str, depth: int) -> Part:
        return Part("@" + self.add_grammar(_text(given["grammar"], f"{path}.grammar")))

    def _any_text(self, given: Any, path: str, depth: int) -> Part:
        return Part(ANYTHING, regular=True, open=True)

    def _sequence(self, given: Any, path: str, depth: int) -> Part:
        elements = _list(given["elements"], f"{path}.elements")
        parts = [
            self._format(element, f"{path}.elements[{i}]", depth)
            for i, element in enumerate(elements)
        ]
        return self._concatenate(parts, path)

    def _or(self, given: Any, path: str, depth: int) -> Part:
        elements = _list(given["elements"], f"{path}.elements")
        parts = [
            self._format(element, f"{path}.elements[{i}]", depth)
            for i, element in enumerate(elements)
        ]
        return self._alternatives(parts)

    def _tag(self, given: Any, path: str, depth: int) -> Part:
        parts = [
            self._literal(given["begin"], f"{path}.begin"),
            self._format(given["content"], f"{path}.content", depth),
            self._literal(given["end"], f"{path}.end"),
        ]
        return self._concatenate(parts, path)

    def _tags(self, given: Any, path: str, depth: int) -> list[Part]:
        tags = _list(given["tags"], f"{path}.tags")
        for i, tag in enumerate(tags):
            where = f"{path}.tags[{i}]"
            _check_object(tag, where, {"begin", "content", "end"}, {"type"})
        return [
            self._format({**t, "type": "tag"}, f"{path}.tags[{i}]", depth)
            for i, t in enumerate(tags)
        ]

    def _tags_with_separator(self, given: Any, path: str, depth: int) -> Part:
        one = self._alternatives(self._tags(given, path, depth))
        separator = self._literal(given["separator"], f"{path}.separator")
        text = self._lark(one)
        if not _flag(given, "stop_after_first", path):
            name = self._rule(text)
            text = f"{name} ({self._lark(separator)} {name})*"
        return Part(f"({text})" if _flag(given, "at_least_one", path) else f"({text})?")

    def _triggered_tags(self, given: Any, path: str, depth: int) -> Part:
        triggers = [
            _text(trigger, f"{path}.triggers")
            for trigger in _list(given["triggers"], f"{path}.triggers")
        ]
        tags = _list(given["tags"], f"{path}.tags")
        whole = self._tags(given, path, depth)
        rests: dict[str, list[Part]] = {trigger: [] for trigger in triggers}
        for i, tag in enumerate(tags):
            begin = tag["begin"]
            trigger = next((t for t in triggers if t and begin.startswith(t)), None)
            if trigger is None:
                raise RequestError(f"{path}.tags[{i}].begin: {begin!r} begins with no trigger")
            rest = {**tag, "type": "tag", "begin": begin[len(trigger) :]}
            rests[trigger].append(self._format(rest, f"{path}.tags[{i}]", depth))
        triggered = [
            f"{self._until(trigger)} {self._lark(self._alternatives(parts))}"
            for trigger, parts in rests.items()
            if parts
        ]
        later = self._rule(" | ".join(triggered))
        text = self._lark(Part(ANYTHING, regular=True))
        first = self._lark(self._alternatives(whole))
        once = _flag(given, "stop_after_first", path)
        if _flag(given, "at_least_one", path):
            return Part(first) if once else Part(f"{first} {later}* {text}", open=True)
        return Part(f"({later} | {text})" if once else f"{later}* {text}", open=True)

    def _literal(self, value: Any, path: str) -> Part:
        """A text, in which special tokens stand for themselves."""
        text = _text(value, path)
        names = sorted(self.special_tokens, key=len, reverse=True)
        if not any(name in text for name in names):
            return Part(rust_literal(text), regular=True)
        pieces = re.split("(" + "|".join(re.escape(name) for name in names) + ")", text)
        return self._concatenate(
            [
                Part(f"<[{self.special_tokens[piece]}]>")
                if piece in self.special_tokens
                else Part(rust_literal(piece), regular=True)
                for piece in pieces
                if piece
            ],
            path,
        )

    def _until(self, trigger: str) -> str:
        """Any text that ends with the first `trigger`."""
        part = self._literal(trigger, "$")
        if not part.regular:
            return f"{self._lark(Part(ANYTHING, regular=True))} {part.text}"
        return self._rule(f"/{ANYTHING}{part.text}/", "[lazy]")

    def _concatenate(self, parts: list[Part], path: str) -> Part:
        merged: list[Part] = []
        for part in parts:
            if part == Part("", regular=True):
                continue
            last = merged[-1] if merged else None
            if last is not None and last.open:
                if last.text != ANYTHING:
                    raise RequestError(f"{path}: nothing can follow free text that has no end")
                merged[-1] = self._text_before(part, path)
            elif last is not None and last.regular and part.regular and not part.open:
                merged[-1] = Part(last.text + part.text, regular=True)
            else:
                merged.append(part)
        if len(merged) == 1:
            return merged[0]
        is_open = bool(merged) and merged[-1].open
        return Part(" ".join(self._lark(part) for part in merged), open=is_open)

    def _text_before(self, end: Part, path: str) -> Part:
        """Any text up to the first `end`, and `end`."""
        if end.regular and not end.open:
            return Part(self._rule(f"/{ANYTHING}{end.text}/", "[lazy]"))
        if end.text.startswith("<["):
            return Part(f"{self._lark(Part(ANYTHING, regular=True))} {end.text}")
        raise RequestError(f"{path}: any_text can only be followed by a text that ends it")

    def _alternatives(self, parts: list[Part]) -> Part:
        is_open = any(part.open for part in parts)
        if all(part.regular for part in parts):
            return Part("(?:" + "|".join(p.text for p in parts) + ")", regular=True, open=is_open)
        return Part("(" + " | ".join(self._lark(part) for part in parts) + ")", open=is_open)

    def _lark(self, part: Part) -> str:
        if not part.regular:
            return part.text
        if not part.text:
            return '""'
        return f"/{part.text}/"

    def _rule(self, body: str, options: str = "") -> str:
        name = f"rule_{len(self.rules)}"
        self.rules.append(f"{name}{options}: {body}")
        return name


FORMATS: dict[str, tuple[set[str], set[str], Callable[[TagGrammar, Any, str, int], Part]]] = {
    "const_string": ({"value"}, set(), TagGrammar._const_string),
    "json_schema": ({"json_schema"}, set(), TagGrammar._json_schema),
    "regex": ({"pattern"}, set(), TagGrammar._regex),
    "grammar": ({"grammar"}, set(), TagGrammar._grammar),
    "any_text": (set(), set(), TagGrammar._any_text),
    "sequence": ({"elements"}, set(), TagGrammar._sequence),
    "or": ({"elements"}, set(), TagGrammar._or),
    "tag": ({"begin", "content", "end"}, set(), TagGrammar._tag),
    "triggered_tags": (
        {"triggers", "tags"},
        {"at_least_one", "stop_after_first"},
        TagGrammar._triggered_tags,
    ),
    "tags_with_separator": (
        {"tags", "separator"},
        {"at_least_one", "stop_after_first"},
        TagGrammar._tags_with_separator,
    ),
}
"""Type -> fields that it needs, fields that it may have, and what builds it."""


def _check_object(value: Any, path: str, required: set[str], optional: set[str]) -> None:
    if not isinstance(value, dict):
        raise RequestError(f"{path}: must be an object")
    if missing := required - value.keys():
        raise RequestError(f"{path}: {', '.join(sorted(missing))} is missing")
    if unknown := value.keys() - required - optional:
        raise RequestError(f"{path}.{min(unknown)}: is not supported")


def _list(value: Any, path: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise RequestError(f"{path}: must be a list with at least one element")
    return value


def _text(value: Any, path: str) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{path}: must be a string, got {json.dumps(value)[:40]}")
    return value


def _flag(given: Any, name: str, path: str) -> bool:
    value = given.get(name, False)
    if not isinstance(value, bool):
        raise RequestError(f"{path}.{name}: must be true or false")
    return value
