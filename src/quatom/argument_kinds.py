"""What an annotation allows: kinds of values, and what is kept of a value of each."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from numbers import Integral, Real
from operator import index
from pathlib import Path
from reprlib import Repr
from types import MappingProxyType, NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

INT64_MAX = 2**63 - 1
"""The largest integer of an argument that has no other bound."""
_BYTES = bytes | bytearray | memoryview


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
        """Raise WrongError if a value has another size."""
        if self.low <= len(value) and (self.high is None or len(value) <= self.high):
            return
        limits = f"at most {self.high}" if not self.low else f"{self.low} to {self.high}"
        limits = f"at least {self.low}" if self.high is None else limits
        raise WrongError(f"{name} must have {limits} {unit}, got {len(value)}")


class WrongError(Exception):
    """What is wrong with a value, in words."""


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


@dataclass(frozen=True, slots=True)
class Kind:
    """Values of one sort: what they are called, which they are, and what is kept of one."""

    words: str
    fits: Callable[[Any], bool]
    take: Callable[[str, Any], Any] = lambda name, value: value


def read_value(name: str, value: Any, kinds: tuple[Kind, ...]) -> Any:
    """What is kept of a value of one of some kinds.

    Raises:
        WrongError: it is of none of them, or outside the bounds of its kind.
    """
    for kind in kinds:
        if kind.fits(value):
            return kind.take(name, value)
    words = " or ".join(dict.fromkeys(kind.words for kind in kinds if kind.words != "None"))
    raise WrongError(f"{name} must be {words}, got {shown(value)}")


def kinds_of(hint: Any, about: tuple[Any, ...] = ()) -> tuple[Kind, ...]:
    """The kinds that an annotation allows, in its order; `about` is what encloses it says."""
    if get_origin(hint) is Annotated:
        inner, *more = get_args(hint)
        return kinds_of(inner, (*about, *more))
    if len(parts := parts_of(hint)) > 1:
        # Text beside a path is the name of a file, with the rules of such names.
        paths = [Path if part is str and Path in parts else part for part in parts]
        return tuple(kind for part in paths for kind in kinds_of(part, about))
    origin = get_origin(hint) or hint
    make = _MAKERS.get(origin)
    return (_instances(origin) if make is None else make(get_args(hint), about),)


def _bound(kind: type, about: tuple[Any, ...]) -> Any:
    return next((one for one in about if isinstance(one, kind)), None)


def _instances(cls: type) -> Kind:
    article = "an" if cls.__name__[0] in "AEIOU" else "a"
    return Kind(f"{article} {cls.__name__}", lambda value: isinstance(value, cls))


def _choices(names: tuple[Any, ...], about: tuple[Any, ...]) -> Kind:
    return Kind(
        f"one of {', '.join(names)}", lambda value: isinstance(value, str) and value in names
    )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) or (isinstance(value, Real) and not isinstance(value, bool))


def _is_integer(value: Any) -> bool:
    return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))


def _integers(args: tuple[Any, ...], about: tuple[Any, ...]) -> Kind:
    bound = _bound(Range, about) or Range(-INT64_MAX - 1)
    low, high = int(bound.low), INT64_MAX if bound.high is None else int(bound.high)

    def take(name: str, value: Any) -> int:
        number = index(value)
        if not low <= number <= high:
            simple = number < low and bound.high is None
            limits = f"at least {low}" if simple else f"from {low} to {high}"
            raise WrongError(f"{name} must be {limits}, got {shown(number)}")
        return number

    return Kind("an integer", _is_integer, take)


def _numbers(args: tuple[Any, ...], about: tuple[Any, ...]) -> Kind:
    bound = _bound(Range, about) or Range(-inf)
    low, high = bound.low, inf if bound.high is None else bound.high
    left, right = "(" if bound.open_low else "[", ")" if bound.high is None else "]"
    limits = "a finite number" if low == -inf else f"in {left}{low:g}, {high:g}{right}"

    def take(name: str, value: Any) -> float:
        try:
            number = float(value)
        except OverflowError:
            number = inf
        above = low < number if bound.open_low else low <= number
        if not (isfinite(number) and above and number <= high):
            raise WrongError(f"{name} must be {limits}, got {shown(value)}")
        return number

    return Kind("a number", _is_number, take)


def _texts(args: tuple[Any, ...], about: tuple[Any, ...]) -> Kind:
    size = _bound(Size, about)

    def take(name: str, value: str) -> str:
        size.check(name, value, "characters")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise WrongError(
                f"{name} holds {value[error.start]!a}, half of a surrogate pair, at character "
                f"{error.start}: it is no Unicode text"
            ) from None
        return value

    any_text = _instances(str)
    return Kind("a string", any_text.fits, any_text.take if size is None else take)


def _paths(args: tuple[Any, ...], about: tuple[Any, ...]) -> Kind:
    def take(name: str, value: str | Path) -> str | Path:
        try:
            encoded = os.fsencode(value)
        except UnicodeEncodeError:
            encoded = b""
        if not encoded or b"\0" in encoded:
            raise WrongError(f"{name} must name a file or folder, got {shown(str(value))}")
        return value

    return Kind("a path", lambda value: isinstance(value, str | Path), take)


def _lists(args: tuple[Any, ...], about: tuple[Any, ...]) -> Kind:
    size, item = _bound(Size, about) or Size(0), kinds_of(args[0] if args else Any)

    def take(name: str, value: Any) -> tuple[Any, ...]:
        size.check(name, value, "items")
        return tuple(read_value(f"{name}[{i}]", one, item) for i, one in enumerate(value))

    return Kind(
        "a list", lambda v: isinstance(v, Sequence) and not isinstance(v, str | _BYTES), take
    )


def _mappings(args: tuple[Any, ...], about: tuple[Any, ...]) -> Kind:
    size, (of_key, of_value) = _bound(Size, about) or Size(0), map(kinds_of, args)

    def take(name: str, value: Any) -> Mapping[Any, Any]:
        size.check(name, value, "items")
        read: dict[Any, Any] = {}
        for key, one in value.items():
            kept = read_value(f"a key of {name}", key, of_key)
            read[kept] = read_value(f"{name}[{shown(key)}]", one, of_value)
        return MappingProxyType(read)

    return Kind("a dict", lambda value: isinstance(value, Mapping), take)


def _always(words: str, fits: Callable[[Any], bool]) -> Callable[[Any, Any], Kind]:
    """A kind of which an annotation says nothing more."""
    return lambda args, about: Kind(words, fits)


_MAKERS: dict[Any, Callable[[tuple[Any, ...], tuple[Any, ...]], Kind]] = {
    Any: _always("anything", lambda value: True),
    NoneType: _always("None", lambda value: value is None),
    bool: _always("true or false", lambda value: isinstance(value, bool)),
    Callable: _always("a function", callable),
    Literal: _choices,
    int: _integers,
    float: _numbers,
    str: _texts,
    Path: _paths,
    **dict.fromkeys((list, tuple, Sequence), _lists),
    Mapping: _mappings,
}
"""Type -> its kind, of the arguments of the annotation and what `Annotated` says."""
