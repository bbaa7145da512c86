"""What users pass in, checked against its annotation before anything is done with it.

The annotation is the only definition of an argument or field: its type, and in `Annotated` its
`Range` or `Size`. Numbers may be Python's or numpy's; what is kept is Python's own, and of a list
or dict a copy that nobody can change. Nothing is guessed: "no" is no switch and "5" no number.
"""

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache, wraps
from inspect import signature
from math import isfinite
from numbers import Integral, Real
from operator import index
from pathlib import Path
from reprlib import Repr
from types import MappingProxyType, NoneType, UnionType
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin
from typing import get_type_hints as hints_of

from quatom.errors import ArgumentError, QuatomError

P = ParamSpec("P")
R = TypeVar("R")
_BYTES = bytes | bytearray | memoryview
INT64_MAX = 2**63 - 1
"""The largest integer of an argument that has no other bound."""


@dataclass(frozen=True, slots=True)
class Range:
    """Bounds of a number, both included."""

    low: float
    high: float | None = None
    """None: there is none but that of int64."""
    open_low: bool = False
    """Leave `low` out."""


@dataclass(frozen=True, slots=True)
class Size:
    """Bounds of the number of items of a list or dict, or of characters of Unicode text."""

    low: int
    high: int | None = None
    """None: there is no upper bound."""

    def check(self, name: str, value: Any, unit: str) -> None:
        """Raise _WrongError if a value has another size."""
        high = len(value) if self.high is None else self.high
        if not self.low <= len(value) <= high:
            limits = f"at most {self.high}" if not self.low else f"{self.low} to {self.high}"
            limits = f"at least {self.low}" if self.high is None else limits
            raise _WrongError(f"{name} must have {limits} {unit}, got {len(value)}")


class _WrongError(Exception):
    """What is wrong, in words; `check` makes the error of it that its caller wants."""


def check(name: str, value: object, hint: Any, error: type[QuatomError]) -> Any:
    """The value as its annotation says, plain numbers and immutable copies.

    Raises:
        QuatomError: as `error`, with the name and the value, if it is of another kind.
    """
    try:
        return _read(name, value, hint)
    except _WrongError as wrong:
        raise error(str(wrong)) from None


def check_fields(instance: Any, error: type[QuatomError], owner: str = "") -> None:
    """Check every field of a dataclass, and keep what `check` gives.

    Args:
        instance: of the dataclass, which may be frozen.
        error: what is raised.
        owner: put before the names of fields, with a dot.

    Raises:
        QuatomError: as `error`, if a field is of another kind than it says.
    """
    hints = _hints(instance.__class__)
    for field in fields(instance):
        name = f"{owner}.{field.name}" if owner else field.name
        value = check(name, getattr(instance, field.name), hints[field.name], error)
        object.__setattr__(instance, field.name, value)


def checked(
    error: type[QuatomError] = ArgumentError, *, but: Collection[str] = ()
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator: the function runs only with arguments that are of the kinds it says.

    Args:
        error: what is raised otherwise.
        but: arguments that the function checks itself, for only it knows what they may be.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        parameters = signature(function)

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            bound, hints = parameters.bind(*args, **kwargs), _hints(function)
            for name in [n for n in bound.arguments if n in hints and n not in but]:
                bound.arguments[name] = check(name, bound.arguments[name], hints[name], error)
            return function(*bound.args, **bound.kwargs)

        return call

    return decorate


def shown(value: object) -> str:
    """A value on one line, about 60 characters of it, whatever it is."""
    try:
        text = _SHORT.repr(value)
    except ValueError:  # of an integer of thousands of digits
        text = f"a {type(value).__name__} too long to show"
    return " ".join(text.split())


def parts_of(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the one type that an annotation is."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


@cache
def _hints(owner: Any) -> dict[str, Any]:
    return hints_of(owner, include_extras=True)


@dataclass(frozen=True, slots=True)
class _Kind:
    """Values of one sort: what they are called, which they are, and what is kept of one."""

    words: str
    fits: Callable[[Any], bool]
    take: Callable[[str, Any, tuple[Any, ...]], Any] = lambda name, value, about: value
    """By name, value, and what the annotation says of it: its arguments, `Range` or `Size`."""


def _read(name: str, value: Any, hint: Any) -> Any:
    options = _options(hint)
    for kind, about in options:
        if kind.fits(value):
            return kind.take(name, value, about)
    words = " or ".join(dict.fromkeys(kind.words for kind, _ in options if kind.words != "None"))
    raise _WrongError(f"{name} must be {words}, got {shown(value)}")


@cache
def _options(hint: Any) -> tuple[tuple[_Kind, tuple[Any, ...]], ...]:
    """The kinds that an annotation allows, in its order, and what it says of each."""
    return tuple(_kinds(hint, ()))


def _kinds(hint: Any, about: tuple[Any, ...]) -> Iterator[tuple[_Kind, tuple[Any, ...]]]:
    if get_origin(hint) is Annotated:
        inner, *more = get_args(hint)
        yield from _kinds(inner, (*about, *more))
    elif len(parts := parts_of(hint)) > 1:
        for part in parts:
            # Text beside a path is the name of a file, with the rules of such names.
            yield from _kinds(Path if part is str and Path in parts else part, about)
    elif (origin := get_origin(hint)) is Literal:
        choices = get_args(hint)
        yield _Kind(f"one of {', '.join(choices)}", lambda value: _is_one_of(value, choices)), about
    else:
        yield _KINDS.get(origin or hint) or _instances(origin or hint), (*get_args(hint), *about)


def _instances(cls: type) -> _Kind:
    article = "an" if cls.__name__[0] in "AEIOU" else "a"
    return _Kind(f"{article} {cls.__name__}", lambda value: isinstance(value, cls))


def _is_one_of(value: Any, choices: tuple[Any, ...]) -> bool:
    return isinstance(value, str) and value in choices


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | _BYTES)


def _bound(kind: type, about: tuple[Any, ...]) -> Any:
    return next((one for one in about if isinstance(one, kind)), None)


def _integer(name: str, value: Any, about: tuple[Any, ...]) -> int:
    number, bound = index(value), _bound(Range, about) or Range(-INT64_MAX - 1)
    low, high = int(bound.low), INT64_MAX if bound.high is None else int(bound.high)
    if not low <= number <= high:
        simple = number < low and bound.high is None
        limits = f"at least {low}" if simple else f"from {low} to {high}"
        raise _WrongError(f"{name} must be {limits}, got {shown(number)}")
    return number


def _number(name: str, value: Any, about: tuple[Any, ...]) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = float("inf")
    bound = _bound(Range, about)
    if bound is None:
        if not isfinite(number):
            raise _WrongError(f"{name} must be a finite number, got {shown(value)}")
        return number
    high = float("inf") if bound.high is None else bound.high
    above = bound.low < number if bound.open_low else bound.low <= number
    if not (isfinite(number) and above and number <= high):
        left, right = "(" if bound.open_low else "[", ")" if bound.high is None else "]"
        raise _WrongError(
            f"{name} must be in {left}{bound.low:g}, {high:g}{right}, got {shown(value)}"
        )
    return number


def _text(name: str, value: str, about: tuple[Any, ...]) -> str:
    if (size := _bound(Size, about)) is None:
        return value
    size.check(name, value, "characters")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _WrongError(
            f"{name} holds {value[error.start]!a}, half of a surrogate pair, at character "
            f"{error.start}: it is no Unicode text"
        ) from None
    return value


def _path(name: str, value: str | Path, about: tuple[Any, ...]) -> str | Path:
    try:
        encoded = os.fsencode(value)
    except UnicodeEncodeError:
        encoded = b""
    if not encoded or b"\0" in encoded:
        raise _WrongError(f"{name} must name a file or folder, got {shown(str(value))}")
    return value


def _check_size(name: str, value: Any, about: tuple[Any, ...]) -> None:
    if (size := _bound(Size, about)) is not None:
        size.check(name, value, "items")


def _items(name: str, value: Any, about: tuple[Any, ...]) -> tuple[Any, ...]:
    _check_size(name, value, about)
    return tuple(_read(f"{name}[{i}]", one, about[0]) for i, one in enumerate(value))


def _entries(name: str, value: Any, about: tuple[Any, ...]) -> Mapping[Any, Any]:
    _check_size(name, value, about)
    of_key, of_value = about[:2]
    return MappingProxyType(
        {
            _read(f"a key of {name}", key, of_key): _read(f"{name}[{shown(key)}]", one, of_value)
            for key, one in value.items()
        }
    )


_LIST = _Kind("a list", _is_list, _items)
_KINDS: dict[Any, _Kind] = {
    Any: _Kind("anything", lambda value: True),
    NoneType: _Kind("None", lambda value: value is None),
    bool: _Kind("true or false", lambda value: isinstance(value, bool)),
    int: _Kind("an integer", lambda v: isinstance(v, Integral) and _is_number(v), _integer),
    float: _Kind("a number", _is_number, _number),
    str: _Kind("a string", lambda value: isinstance(value, str), _text),
    Path: _Kind("a path", lambda value: isinstance(value, str | Path), _path),
    list: _LIST,
    tuple: _LIST,
    Sequence: _LIST,
    Mapping: _Kind("a dict", lambda value: isinstance(value, Mapping), _entries),
    Callable: _Kind("a function", callable),
}
