"""Grammars of formats that write each argument by itself instead of one JSON object."""

import json
from collections.abc import Callable
from typing import Any

from quatom.errors import RequestError
from quatom.serving.tools.format import Grammar
from quatom.serving.tools.function import Function

_DEFINITIONS = ("$defs", "definitions")
_KNOWN = {
    *_DEFINITIONS,
    "$schema",
    "$id",
    "type",
    "title",
    "description",
    "properties",
    "required",
    "additionalProperties",
}

NOTHING: Grammar = {"type": "const_string", "value": ""}


def argument_schemas(function: Function) -> dict[str, tuple[dict[str, Any], bool]]:
    """Schema of each argument, and whether it is required; the required ones first.

    Raises:
        RequestError: the schema says something about several arguments together.
    """
    schema = function.parameters
    others = sorted(schema.keys() - _KNOWN)
    if others:
        raise RequestError(
            f"this model writes arguments one by one, so that {others[0]!r} in the parameters of "
            f"function {function.name!r} cannot be enforced"
        )
    properties, required = schema.get("properties", {}), set(schema.get("required", ()))
    missing = sorted(required - properties.keys())
    if missing:
        raise RequestError(
            f"function {function.name!r} requires {missing[0]!r}, which its properties do not have"
        )
    shared = {key: schema[key] for key in _DEFINITIONS if key in schema}
    ordered = sorted(properties, key=lambda key: key not in required)  # stable
    return {key: ({**shared, **_as_object(properties[key])}, key in required) for key in ordered}


def sequence(*elements: Grammar) -> Grammar:
    """One after the other."""
    return {"type": "sequence", "elements": list(elements)}


def either(*elements: Grammar) -> Grammar:
    """One of them."""
    return {"type": "or", "elements": list(elements)}


def const(value: str) -> Grammar:
    """A text."""
    return {"type": "const_string", "value": value}


def json_value(schema: dict[str, Any]) -> Grammar:
    """A value in JSON."""
    return {"type": "json_schema", "json_schema": schema}


def arguments(
    function: Function, write: Callable[[str, dict[str, Any]], Grammar], separator: str
) -> Grammar:
    """All required arguments in order, then any of the others.

    Args:
        function: whose arguments.
        write: (name, schema) -> grammar of one argument.
        separator: between two arguments.
    """
    schemas = argument_schemas(function)
    required = [write(key, schema) for key, (schema, needed) in schemas.items() if needed]
    optional = [write(key, schema) for key, (schema, needed) in schemas.items() if not needed]
    if required or not separator:
        parts = required[:1]
        parts += [sequence(const(separator), one) for one in required[1:]]
        parts += [either(sequence(const(separator), one), NOTHING) for one in optional]
        return sequence(*parts) if parts else NOTHING
    if not optional:
        return NOTHING
    starts = []  # whichever comes first has no separator before it
    for i, one in enumerate(optional):
        rest = [either(sequence(const(separator), other), NOTHING) for other in optional[i + 1 :]]
        starts.append(sequence(one, *rest))
    return either(*starts, NOTHING)


def _as_object(schema: Any) -> dict[str, Any]:
    if schema is True:
        return {}
    if not isinstance(schema, dict):
        raise RequestError(f"a property's schema must be an object, got {json.dumps(schema)}")
    return schema
