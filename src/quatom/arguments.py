"""What users pass in, checked against its annotation before anything is done with it.

The annotation is the only definition of an argument or field: its type, and in `Annotated` its
`Range` or `Size`. Numbers may be Python's or numpy's; what is kept is Python's own, and of a list
or dict a copy that nobody can change. Nothing is guessed: "no" is no switch and "5" no number.
"""

from collections.abc import Callable, Collection
from dataclasses import fields
from functools import cache, wraps
from inspect import signature
from typing import Any, ParamSpec, TypeVar, get_type_hints

from quatom.argument_kinds import Kind, Range, Size, WrongError, kinds_of, read_value, shown
from quatom.errors import ArgumentError, QuatomError

__all__ = ["Range", "Size", "check", "check_fields", "checked", "shown"]

P = ParamSpec("P")
R = TypeVar("R")


def check(name: str, value: object, hint: Any, error: type[QuatomError]) -> Any:
    """The value as its annotation says, plain numbers and immutable copies.

    Raises:
        QuatomError: as `error`, with the name and the value, if it is of another kind.
    """
    try:
        return read_value(name, value, kinds_of(hint))
    except WrongError as wrong:
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
    kinds, prefix = _kinds_of(instance.__class__), f"{owner}." if owner else ""
    try:
        for field in fields(instance):
            name = prefix + field.name
            given = getattr(instance, field.name)
            if given is not field.default:  # which is right, and there for most fields
                kept = read_value(name, given, kinds[field.name])
                object.__setattr__(instance, field.name, kept)
    except WrongError as wrong:
        raise error(str(wrong)) from None


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
            bound, kinds = parameters.bind(*args, **kwargs), _kinds_of(function)
            try:
                for name in [n for n in bound.arguments if n in kinds and n not in but]:
                    bound.arguments[name] = read_value(name, bound.arguments[name], kinds[name])
            except WrongError as wrong:
                raise error(str(wrong)) from None
            return function(*bound.args, **bound.kwargs)

        return call

    return decorate


@cache
def _kinds_of(owner: Any) -> dict[str, tuple[Kind, ...]]:
    """What the fields of a class or the arguments of a function may be, by name."""
    hints = get_type_hints(owner, include_extras=True)
    return {name: kinds_of(hint) for name, hint in hints.items() if name != "return"}
