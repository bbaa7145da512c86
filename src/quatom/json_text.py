"""JSON read strictly: what two readers could understand differently is refused."""

import json
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is no JSON, gives a key two values, holds NaN, Infinity or half of a
            surrogate pair, none of which other programs read alike, or is nested too deeply.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
    except RecursionError:
        raise ValueError("its values are nested too deeply to be read") from None
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise ValueError(f"it holds {half}, half of a surrogate pair; remove it") from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found and found[key] != value:
            raise ValueError(
                f"the key {key!r} has two values, {found[key]!r:.60} and {value!r:.60}; keep one"
            )
        found[key] = value
    return found


def _constant(name: str) -> Any:
    raise ValueError(f"it holds {name}, which JSON does not have; give a number or null")
