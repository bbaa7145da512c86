"""What becomes of each keyword of JSON Schema: enforced, only described, or refused by its name.

A keyword that is in no table is refused. docs/serving.md shows `markdown_table`.
"""

from enum import Enum, auto


class Holds(Enum):
    """Where a keyword's value has schemas in it."""

    NOTHING = auto()
    SCHEMA = auto()
    SCHEMAS = auto()
    """A list."""
    NAMED = auto()
    """An object whose values are schemas."""


ENFORCED: dict[str, Holds] = {
    "type": Holds.NOTHING,
    "enum": Holds.NOTHING,
    "const": Holds.NOTHING,
    "$ref": Holds.NOTHING,
    "anyOf": Holds.SCHEMAS,
    "oneOf": Holds.SCHEMAS,
    "allOf": Holds.SCHEMAS,
    "properties": Holds.NAMED,
    "patternProperties": Holds.NAMED,
    "additionalProperties": Holds.SCHEMA,
    "required": Holds.NOTHING,
    "minProperties": Holds.NOTHING,
    "maxProperties": Holds.NOTHING,
    "items": Holds.SCHEMA,
    "prefixItems": Holds.SCHEMAS,
    "additionalItems": Holds.SCHEMA,
    "minItems": Holds.NOTHING,
    "maxItems": Holds.NOTHING,
    "minLength": Holds.NOTHING,
    "maxLength": Holds.NOTHING,
    "pattern": Holds.NOTHING,
    "format": Holds.NOTHING,
    "minimum": Holds.NOTHING,
    "maximum": Holds.NOTHING,
    "exclusiveMinimum": Holds.NOTHING,
    "exclusiveMaximum": Holds.NOTHING,
    "multipleOf": Holds.NOTHING,
}
"""Every generated text obeys these."""

STRUCTURE: dict[str, Holds] = {
    "$defs": Holds.NAMED,
    "definitions": Holds.NAMED,
    "$schema": Holds.NOTHING,
    "$id": Holds.NOTHING,
    "id": Holds.NOTHING,
    "$anchor": Holds.NOTHING,
}
"""Where schemas are kept and how they are called."""

ANNOTATIONS = frozenset(
    {
        "title",
        "description",
        "default",
        "examples",
        "example",
        "deprecated",
        "readOnly",
        "writeOnly",
        "$comment",
        "discriminator",
    }
)
"""These allow and forbid nothing. discriminator (OpenAPI) only points at one of the alternatives,
which are enforced themselves."""

REFUSED = frozenset(
    {
        "not",
        "if",
        "then",
        "else",
        "contains",
        "minContains",
        "maxContains",
        "uniqueItems",
        "unevaluatedItems",
        "unevaluatedProperties",
        "propertyNames",
        "dependentRequired",
        "dependentSchemas",
        "dependencies",
        "$dynamicRef",
        "$dynamicAnchor",
        "$recursiveRef",
        "$recursiveAnchor",
        "$vocabulary",
        "contentEncoding",
        "contentMediaType",
        "contentSchema",
        "nullable",
    }
)
"""Keywords that no automaton here can hold a text to."""

FORMATS = frozenset(
    {
        "date-time",
        "date",
        "time",
        "duration",
        "email",
        "hostname",
        "ipv4",
        "ipv6",
        "uuid",
        "uri",
    }
)

LIMITS = {
    "$ref": "within the document: `#`, `#/...` or `#name`",
    "oneOf": "if the alternatives exclude each other by `type`, or by `const` or `enum` of a "
    "required property",
    "format": ", ".join(f"`{name}`" for name in sorted(FORMATS)),
    "pattern": "what ECMA-262 and Python's `re` share; no look-around, back references, flags, "
    "word boundaries, `\\p`",
    "patternProperties": "patterns as for `pattern`; no name may match two of them",
    "const": "integers below 2^63, other numbers below 2^53",
    "enum": "numbers as in `const`",
    "minimum": "from -2^53 to 2^53",
    "maximum": "from -2^53 to 2^53",
    "exclusiveMinimum": "from -2^53 to 2^53",
    "exclusiveMaximum": "from -2^53 to 2^53",
    "multipleOf": "whole numbers up to 2^53",
    "minProperties": "up to the number of `required` names; 1 where all `properties` are required",
    "maxProperties": "where all `properties` are required",
    "additionalItems": "before draft 2020-12",
    "required": "names in `properties` or not",
}
"""How far a keyword is enforced; a schema that asks for more is refused."""


def markdown_table() -> str:
    """The rows of docs/serving.md."""
    lines = ["| keyword | enforced |", "|---|---|"]
    for name in ENFORCED:
        lines.append(f"| `{name}` | {LIMITS.get(name, 'yes')} |")
    for title, names in (("annotations", ANNOTATIONS), ("refused by name", REFUSED)):
        lines.append(f"| {title} | {', '.join(f'`{name}`' for name in sorted(names))} |")
    return "\n".join(lines)
