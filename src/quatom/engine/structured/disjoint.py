"""Whether the alternatives of a oneOf exclude each other, so that it says the same as anyOf."""

import json
from collections.abc import Callable
from itertools import combinations
from typing import Any

TYPES = frozenset({"null", "boolean", "integer", "number", "string", "array", "object"})
MAX_REFERENCES = 100

Resolve = Callable[[str], Any]
"""A `$ref` to the schema that it names."""


def exclude_each_other(options: list[Any], resolve: Resolve) -> bool:
    """Whether no value can satisfy two of the schemas. False also where that is not known."""
    targets = [_follow(option, resolve) for option in options]
    return all(_disjoint(a, b) for a, b in combinations(targets, 2))


def _disjoint(a: Any, b: Any) -> bool:
    if a is False or b is False:
        return True
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return False
    if not _types(a) & _types(b):
        return True
    values = _values(a), _values(b)
    if values[0] is not None and values[1] is not None:
        return not values[0] & values[1]
    return _told_apart(a, b)


def _told_apart(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether both are objects alone, and a property that both need has other values in each."""
    if _types(a) != {"object"} or _types(b) != {"object"}:
        return False
    for name in {*a.get("required", ())} & {*b.get("required", ())}:
        first, second = (_values(schema.get("properties", {}).get(name, True)) for schema in (a, b))
        if first is not None and second is not None and not first & second:
            return True
    return False


def _types(schema: dict[str, Any]) -> set[str]:
    """Types that a value may have, with every integer counted as a number."""
    if (values := _values(schema)) is not None:
        return {_type_of(json.loads(value)) for value in values}
    given = schema.get("type", TYPES)
    names = {given} if isinstance(given, str) else {*given}
    return {"number" if name == "integer" else name for name in names}


def _type_of(value: Any) -> str:
    for name, kind in (("boolean", bool), ("null", type(None)), ("string", str), ("array", list)):
        if isinstance(value, kind):
            return name
    return "object" if isinstance(value, dict) else "number"


def _values(schema: Any) -> set[str] | None:
    """The values that a const or enum allows, as JSON; None: there is neither."""
    if not isinstance(schema, dict):
        return None
    if "const" in schema:
        return {_canonical(schema["const"])}
    if "enum" in schema:
        return {_canonical(value) for value in schema["enum"]}
    return None


def _canonical(value: Any) -> str:
    """Equal for values that JSON Schema holds to be equal: 1 and 1.0 are."""
    return json.dumps(_whole(value), sort_keys=True)


def _whole(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_whole(item) for item in value]
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in value.items()}
    return value


def _follow(schema: Any, resolve: Resolve) -> Any:
    """The schema that a chain of bare references leads to."""
    for _ in range(MAX_REFERENCES):
        if not (isinstance(schema, dict) and isinstance(schema.get("$ref"), str)):
            break
        schema = resolve(schema["$ref"])
    return schema
