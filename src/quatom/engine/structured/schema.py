"""A JSON schema, checked keyword by keyword and written so that llguidance enforces all of it.

llguidance is sound for what it takes, up to the numbers and patterns that are narrowed here. Every
place of the document that is a schema is visited; each keyword there is enforced, an annotation, or
the reason for a refusal that names it with its JSON path.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from quatom.engine.structured import keywords
from quatom.engine.structured.disjoint import exclude_each_other
from quatom.engine.structured.formats import FORMAT_LENGTHS, FORMAT_PATTERNS
from quatom.engine.structured.keywords import Holds
from quatom.engine.structured.pattern import rust_search
from quatom.errors import RequestError

DRAFTS = (
    "http://json-schema.org/draft-04/schema",
    "http://json-schema.org/draft-06/schema",
    "http://json-schema.org/draft-07/schema",
    "https://json-schema.org/draft/2019-09/schema",
    "https://json-schema.org/draft/2020-12/schema",
)
EXACT = 2**53
"""Whole numbers up to this are exact in float64, llguidance's type for bounds."""
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
COUNTS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")


@dataclass(frozen=True, slots=True)
class Place:
    """One schema inside of a document."""

    path: str
    """As messages show it: `$.properties.a`."""
    pointer: str
    """As `$ref` names it: `#/properties/a`."""
    schema: Any
    written_for: dict[str, str] = field(default_factory=dict)
    """Keyword that was written here -> the one of the request that it stands for."""


@dataclass(frozen=True, slots=True)
class PreparedSchema:
    """A document for llguidance."""

    schema: dict[str, Any]
    places: list[Place]
    """All its schemas, a schema before those inside of it."""


def parse_schema(text: str) -> Any:
    """JSON text to a schema.

    Raises:
        RequestError: it is not JSON, or neither an object nor a boolean.
    """
    try:
        schema = json.loads(text, parse_constant=_refuse_constant)
    except ValueError as error:
        raise RequestError(f"a schema must be JSON: {error}") from error
    if not isinstance(schema, dict | bool):
        raise RequestError(f"a JSON schema is an object, got {text[:40]!r}")
    return schema


def prepare_schema(schema: Any) -> PreparedSchema:
    """Check a parsed schema and rewrite it in place.

    Raises:
        RequestError: it is no schema of its draft, or a keyword cannot be enforced.
    """
    if schema is False:
        raise RequestError("$: the schema is false, which allows no text at all")
    root: dict[str, Any] = {} if schema is True else schema
    _check_draft(root)
    places = list(_places(root))
    by_pointer = {place.pointer: place.schema for place in places}
    for place in places:
        if isinstance(place.schema, dict) and "$anchor" in place.schema:
            by_pointer["#" + place.schema["$anchor"]] = place.schema
    for place in places:
        if isinstance(place.schema, dict):
            _check_keywords(place, by_pointer)
    for place in places:
        if isinstance(place.schema, dict):
            _rewrite(place, lambda reference: by_pointer.get(unquote(reference)))
    return PreparedSchema(root, places)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _check_draft(root: dict[str, Any]) -> None:
    """Hold the document against the metaschema of its draft, the newest if it names none."""
    import jsonschema_rs

    draft = root.get("$schema", DRAFTS[-1])
    # Of another draft the library would try to fetch the metaschema.
    if not isinstance(draft, str) or draft.rstrip("#") not in DRAFTS:
        raise RequestError(f"$.$schema: {str(draft)[:80]!r} is none of {', '.join(DRAFTS)}")
    try:
        jsonschema_rs.meta.validate(root)
    except jsonschema_rs.ValidationError as error:
        path = "".join(_path_part(part) for part in error.instance_path)
        raise RequestError(f"${path}: {error.message[:200]}") from error


def _places(root: dict[str, Any]) -> Iterator[Place]:
    holders = {**keywords.ENFORCED, **keywords.STRUCTURE}
    stack = [Place("$", "#", root)]
    while stack:
        place = stack.pop()
        yield place
        if not isinstance(place.schema, dict):
            continue
        for name, value in place.schema.items():
            for suffix, inner in _held(holders.get(name, Holds.NOTHING), value):
                path = "".join(_path_part(part) for part in (name, *suffix))
                pointer = "".join("/" + _escape(part) for part in (name, *suffix))
                stack.append(Place(place.path + path, place.pointer + pointer, inner))


def _held(holds: Holds, value: Any) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    if holds is Holds.NAMED:
        yield from (((key,), inner) for key, inner in value.items())
    elif holds is not Holds.NOTHING and isinstance(value, list):  # before 2020-12 items may be one
        yield from (((index,), inner) for index, inner in enumerate(value))
    elif holds is not Holds.NOTHING:
        yield (), value


def _path_part(part: str | int) -> str:
    if isinstance(part, int):
        return f"[{part}]"
    return f".{part}" if re.fullmatch(r"[$\w-]+", part) else f"[{json.dumps(part)}]"


def _escape(part: str | int) -> str:
    return str(part).replace("~", "~0").replace("/", "~1")


def _refuse(place: Place, keyword: str, reason: str) -> RequestError:
    return RequestError(f"{place.path}{_path_part(keyword)}: {reason}")


def _check_keywords(place: Place, by_pointer: dict[str, Any]) -> None:
    schema = place.schema
    if schema.get("uniqueItems") is False:
        del schema["uniqueItems"]
    for name in keywords.ANNOTATIONS & schema.keys():
        del schema[name]
    for name, value in schema.items():
        if name in keywords.REFUSED:
            raise _refuse(place, name, f"the keyword {name} cannot be enforced: leave it out")
        if name not in keywords.ENFORCED and name not in keywords.STRUCTURE:
            raise _refuse(place, name, f"{name[:40]!r} is no keyword of JSON Schema")
        if check := CHECKS.get(name):
            schema[name] = check(place, name, value)
    for name in ("$id", "id", "$schema"):
        if place.pointer != "#" and name in schema:
            raise _refuse(place, name, "a schema inside of another must not have its own")
    reference = schema.get("$ref")
    if reference is not None and unquote(reference) not in by_pointer:
        raise _refuse(
            place,
            "$ref",
            f"{reference[:80]!r} leads to no schema of this document; `#`, `#/...` and `#name` can",
        )


def _count(place: Place, name: str, value: Any) -> int:
    return int(value)  # JSON Schema allows 2.0


def _bound(place: Place, name: str, value: Any) -> Any:
    if abs(value) > EXACT:  # a bool in draft 4, which this lets through
        raise _refuse(place, name, f"{value} is beyond 2^53 and cannot be enforced exactly")
    return value


def _multiple(place: Place, name: str, value: Any) -> int:
    if value != int(value) or value > EXACT:
        raise _refuse(place, name, f"{value}: only whole numbers up to 2^53 can be enforced")
    return int(value)


def _values(place: Place, name: str, value: Any) -> Any:
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict | list):
            stack += item.values() if isinstance(item, dict) else item
        limit = 2**63 - 1 if isinstance(item, int) else EXACT
        if isinstance(item, int | float) and abs(item) > limit:
            raise _refuse(place, name, f"the number {item} has too many digits to be kept")
    return value


def _format(place: Place, name: str, value: Any) -> Any:
    if value not in keywords.FORMATS:
        known = ", ".join(sorted(keywords.FORMATS))
        raise _refuse(place, name, f"format {value!r} cannot be enforced; these can: {known}")
    return value


def _pattern(place: Place, name: str, value: str) -> str:
    try:
        return f"^(?:{rust_search(value)})$"
    except RequestError as error:
        raise _refuse(place, name, f"the pattern {value[:80]!r} cannot be enforced: {error}") from (
            error
        )


def _patterns(place: Place, name: str, value: dict[str, Any]) -> dict[str, Any]:
    translated = {_pattern(place, name, key): inner for key, inner in value.items()}
    if len(translated) < len(value):
        raise _refuse(place, name, "two patterns are the same")
    return translated


CHECKS: dict[str, Callable[[Place, str, Any], Any]] = {
    **dict.fromkeys(COUNTS, _count),
    **dict.fromkeys(BOUNDS, _bound),
    "multipleOf": _multiple,
    "const": _values,
    "enum": _values,
    "format": _format,
    "pattern": _pattern,
    "patternProperties": _patterns,
}
"""Keyword -> what it becomes, or a refusal."""


def _rewrite(place: Place, resolve: Callable[[str], Any]) -> None:
    """Say what llguidance does not take, or takes too loosely, in keywords that it enforces."""
    schema = place.schema
    named = schema.get("format")
    if named in FORMAT_PATTERNS:
        del schema["format"]
        _also(place, "format", {"pattern": f"^(?:{FORMAT_PATTERNS[named]})$"})
    if named in FORMAT_LENGTHS:
        _also(place, "format", {"maxLength": FORMAT_LENGTHS[named]})
    least = schema.get("minProperties", 0)
    if least <= len({*schema.get("required", ())}):
        schema.pop("minProperties", None)
    elif least > 1:  # a repeated name would be counted twice
        raise _refuse(place, "minProperties", f"{least} is more than the required names and than 1")
    if "oneOf" in schema and exclude_each_other(schema["oneOf"], resolve):
        _also(place, "oneOf", {"anyOf": schema.pop("oneOf")})


def _also(place: Place, instead_of: str, more: dict[str, Any]) -> None:
    """Demand `more` too, beside keywords of the same name."""
    schema = place.schema
    if more.keys() & schema.keys():
        more = {"allOf": [*schema.get("allOf", ()), more]}
    schema.update(more)
    place.written_for.update(dict.fromkeys(more, instead_of))
