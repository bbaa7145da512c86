"""From what a request asks for to a grammar of llguidance, or to a refusal that says why not."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quatom.engine.sampling import StructuredOutput
from quatom.engine.structured.pattern import rust_literal, rust_match
from quatom.engine.structured.schema import PreparedSchema, parse_schema, prepare_schema
from quatom.engine.structured.tags import TagGrammar
from quatom.errors import RequestError

MAX_CONSTRAINT_CHARS = 100_000
"""Length of a schema, expression, grammar or list of choices."""
SEPARATORS = {
    "item_separator": ", ",
    "key_separator": ": ",
    # Free whitespace would let a model fill its whole length with it.
    "whitespace_flexible": False,
    "coerce_one_of": False,
    "lenient": False,
}
MAIN = "main"


@dataclass(slots=True)
class Constraint:
    """One constraint as grammars of llguidance; the first one is where the text begins."""

    grammars: list[dict[str, Any]] = field(default_factory=list)
    schemas: dict[str, PreparedSchema] = field(default_factory=dict)
    """By the JSON path at which the request holds them."""

    def text(self) -> str:
        """What llguidance compiles."""
        return json.dumps({"grammars": self.grammars})

    def add_schema(self, schema: Any, path: str) -> str:
        """Add a parsed JSON schema; returns the name of its grammar."""
        try:
            prepared = prepare_schema(schema)
        except RequestError as error:
            raise RequestError(str(error).replace("$", path, 1)) from error
        name = f"schema_{len(self.grammars)}"
        options = {**prepared.schema, "x-guidance": SEPARATORS}
        self.grammars.append({"name": name, "json_schema": options})
        self.schemas[path] = prepared
        return name

    def add_lark(self, lark: str, name: str) -> str:
        """Add a Lark grammar under a name."""
        self.grammars.append({"name": name, "lark_grammar": lark})
        return name

    def add_grammar(self, grammar: str) -> str:
        """Add a grammar of a request, Lark or GBNF; returns its name."""
        if "%json" in grammar:
            raise RequestError("%json is not supported in a grammar: use a structural tag")
        from llguidance.gbnf_to_lark import any_to_lark

        try:
            lark = any_to_lark(grammar)
        except Exception as error:  # its parser has errors of many types
            raise RequestError(f"not a grammar: {str(error)[:200]}") from error
        return self.add_lark(lark, f"grammar_{len(self.grammars)}")


def compile_constraint(
    wanted: StructuredOutput, special_tokens: Mapping[str, int] | None = None
) -> Constraint:
    """Check a constraint and translate all of it.

    Args:
        wanted: the constraint that a request asks for.
        special_tokens: token ids by their text, for structural tags.

    Raises:
        RequestError: it is invalid, too long, or has a part that cannot be enforced; the message
            has its JSON path.
    """
    if len(wanted.value) > MAX_CONSTRAINT_CHARS:
        raise RequestError(
            f"the {wanted.kind} has {len(wanted.value)} characters; at most "
            f"{MAX_CONSTRAINT_CHARS} are accepted"
        )
    constraint = Constraint()
    try:
        match wanted.kind:
            case "json_schema":
                constraint.add_schema(parse_schema(wanted.value), "$")
            case "json_object":
                constraint.add_schema({"type": "object"}, "$")
            case "regex":
                constraint.add_lark(_one_lexeme(rust_match(wanted.value)), MAIN)
            case "choice":
                constraint.add_lark(_one_lexeme(_choices(wanted.value)), MAIN)
            case "grammar":
                constraint.add_grammar(wanted.value)
            case "structural_tag":
                _add_tag(constraint, wanted.value, special_tokens or {})
    except RequestError as error:
        raise RequestError(f"invalid {wanted.kind}: {error}") from error
    except RecursionError as error:
        raise RequestError(f"invalid {wanted.kind}: it is nested too deeply") from error
    return constraint


def _one_lexeme(expression: str) -> str:
    if not expression:
        raise RequestError("the empty text is all that it allows")
    return f"start: /{expression}/"


def _choices(value: str) -> str:
    choices = json.loads(value)
    if not isinstance(choices, list) or not all(isinstance(c, str) and c for c in choices):
        raise RequestError("choices are a list of non-empty strings")
    if not choices:
        raise RequestError("the list of choices is empty")
    return "|".join(rust_literal(choice) for choice in dict.fromkeys(choices))


def _add_tag(constraint: Constraint, value: str, special_tokens: Mapping[str, int]) -> None:
    try:
        tag = json.loads(value)
    except ValueError as error:
        raise RequestError(f"a structural tag must be JSON: {error}") from error
    inner = Constraint()
    lark = TagGrammar(special_tokens, inner.add_schema, inner.add_grammar).lark(tag)
    constraint.add_lark(lark, MAIN)
    constraint.grammars += inner.grammars
    constraint.schemas |= inner.schemas
