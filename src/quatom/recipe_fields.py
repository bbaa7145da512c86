"""Dataclasses of plain fields: values checked against annotations, and read from JSON types.

A field whose annotation is a union of dataclasses is tagged: the `method` of an object says which
of them it is. So options of one method cannot be given with another method.
"""

from dataclasses import MISSING, fields, is_dataclass
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from quatom.argument_kinds import parts_of
from quatom.arguments import check, check_fields
from quatom.errors import RecipeError

TAG = "method"
"""The field that says which dataclass of a union an object is; absent, it is the first."""


def items_of(hint: Any) -> Any:
    """X of tuple[X, ...]; None of any other annotation."""
    return get_args(hint)[0] if get_origin(hint) is tuple else None


def dataclasses_in(hint: Any) -> tuple[type, ...]:
    """The dataclasses that an annotation allows, or that a tuple holds, in its order."""
    parts = parts_of(items_of(hint) or hint)
    return tuple(part for part in parts if isinstance(part, type) and is_dataclass(part))


def is_optional(hint: Any) -> bool:
    """Whether an annotation allows None."""
    return NoneType in parts_of(hint)


def tags_of(cls: type) -> tuple[str, ...]:
    """The values of `method` that mean dataclass `cls`."""
    return get_args(get_type_hints(cls)[TAG])


def check_types(owner: str, spec: Any) -> None:
    """Every field against its annotation: what comes from JSON may hold anything.

    A misspelt choice must not be taken for another one: an unknown method is an error, not GPTQ.

    Raises:
        RecipeError: a value is not of the type, or not one of the choices.
    """
    check_fields(spec, RecipeError, owner)


def read_fields(cls: type, data: object, owner: str = "") -> Any:
    """Build dataclass `cls` from nested dicts.

    Args:
        cls: what to build.
        data: its fields by name; those with a default may be left out.
        owner: full name of the object for messages; "" is the whole recipe.

    Raises:
        RecipeError: a field is unknown, missing or not allowed; its full name is in the message.
    """
    shown = owner or "recipe"
    if not isinstance(data, dict):
        raise RecipeError(f"{shown} must be an object with named fields, got {data!r}")
    known = {f.name for f in fields(cls)}
    if unknown := sorted(data.keys() - known, key=str):
        of = f" of {TAG} {tags_of(cls)[0]!r}" if TAG in known and len(tags_of(cls)) == 1 else ""
        raise RecipeError(f"unknown keys {unknown} in {shown}{of}; known keys are {sorted(known)}")
    hints = get_type_hints(cls)
    for item in fields(cls):
        required = item.default is MISSING and item.default_factory is MISSING
        if required and item.name not in data:
            raise RecipeError(f"{shown} needs {item.name}: {', '.join(get_args(hints[item.name]))}")
    prefix = f"{owner}." if owner else ""
    return cls(
        **{key: _read_value(hints[key], value, f"{prefix}{key}") for key, value in data.items()}
    )


def _read_value(hint: Any, value: object, name: str) -> Any:
    if (item := items_of(hint)) is not None:
        if not isinstance(value, list | tuple):
            return value
        return tuple(_read_value(item, one, f"{name}[{i}]") for i, one in enumerate(value))
    allowed = dataclasses_in(hint)
    if not allowed or (value is None and is_optional(hint)):
        return value
    if len(allowed) == 1 or not isinstance(value, dict):
        return read_fields(allowed[0], value, name)
    by_tag = {tag: cls for cls in allowed for tag in tags_of(cls)}
    tag = value.get(TAG, next(iter(by_tag)))
    check(f"{name}.{TAG}", tag, Literal[tuple(by_tag)], RecipeError)
    return read_fields(by_tag[tag], value, name)
