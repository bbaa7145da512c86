"""Strict reading of a config.json: each key is read by a family, harmless, or refused by name."""

from collections.abc import Iterator, Mapping
from math import isfinite
from reprlib import Repr
from typing import Any, TypeGuard

from quatom.errors import ModelError
from quatom.families.harmless import (
    CHANGING,
    HARMLESS,
    HARMLESS_PREFIXES,
    HARMLESS_SUFFIXES,
    NEUTRAL,
)

_SECTIONS = ("rope_parameters", "rope_scaling")


class Keys:
    """The keys of a config.json, and which of them a family has read.

    Entries of the rotary sections go by dotted names: "rope_parameters.rope_theta". null counts as
    absent, but for the methods that end in `_or_none`. Where a method takes several names, they are
    spellings of one key: the values that are present must be equal.
    """

    def __init__(self, config: Mapping[str, Any]):
        """Flatten `config`.

        Raises:
            ModelError: it, or a rotary section of it, is no object.
        """
        if not isinstance(config, Mapping):
            raise ModelError(f"config.json must hold an object, got {type(config).__name__}")
        self._values = dict(_leaves(config))
        self._read: set[str] = set()

    def value(self, *names: str) -> Any:
        """The value under whichever of `names` is present, None if none is.

        Raises:
            ModelError: two of them are present and differ.
        """
        self._read.update(names)
        present = [name for name in names if self._values.get(name) is not None]
        for name in present[1:]:
            if not _same(self._values[name], self._values[present[0]]):
                raise ModelError(
                    f"config keys {self.show(present[0])} and {self.show(name)} contradict each "
                    "other; keep the one that is right"
                )
        return self._values[present[0]] if present else None

    def unread(self, name: str) -> Any:
        """The value of a key that nobody read, None if there is no such key."""
        return None if name in self._read else self._values.get(name)

    def ignore(self, *names: str) -> None:
        """Let `names` pass with any value: they have no effect in this family."""
        self._read.update(names)

    def integer(self, *names: str, default: int | None = None, least: int = 1) -> int:
        """An integer of at least `least`; without a default the key is required.

        Raises:
            ModelError: it is missing or something else; true and 1.0 are no integers.
        """
        value = self.value(*names)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            kind = {0: "an integer of at least 0", 1: "a positive integer"}.get(least)
            raise self._wrong(names, kind or f"an integer of at least {least}", value)
        return value

    def integer_or_none(self, name: str, *, default: int | None) -> int | None:
        """A positive integer; None where config.json says null; `default` where it says nothing."""
        return self.integer(name) if self._says_something(name) else self._absent(name, default)

    def number(self, *names: str, default: float | None = None) -> float:
        """A finite number, whole or not; without a default the key is required.

        Raises:
            ModelError: it is missing or something else; true and "1" are no numbers.
        """
        value = self.value(*names)
        value = default if value is None else value
        if not _is_number(value):
            raise self._wrong(names, "a number", value)
        return float(value)

    def number_or_none(self, name: str, *, default: float | None) -> float | None:
        """A finite number; None where config.json says null; `default` where it says nothing."""
        return self.number(name) if self._says_something(name) else self._absent(name, default)

    def positive(self, *names: str, default: float | None = None) -> float:
        """A number above 0."""
        value = self.number(*names, default=default)
        if not value > 0.0:
            raise self._wrong(names, "a positive number", value)
        return value

    def flag(self, *names: str, default: bool = False) -> bool:
        """True or false."""
        value = self.value(*names)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self._wrong(names, "true or false", value)
        return value

    def text(self, *names: str, default: str) -> str:
        """A string."""
        value = self.value(*names)
        value = default if value is None else value
        if not isinstance(value, str):
            raise self._wrong(names, "a string", value)
        return value

    def numbers(self, *names: str) -> tuple[float, ...]:
        """A required list of finite numbers."""
        value = self.value(*names)
        if not isinstance(value, list | tuple) or not all(_is_number(entry) for entry in value):
            raise self._wrong(names, "a list of numbers", value)
        return tuple(float(entry) for entry in value)

    def per_layer(self, name: str, layers: int, *allowed: Any) -> tuple[Any, ...] | None:
        """A list with one of the `allowed` values per layer, None where it is absent.

        Raises:
            ModelError: it is no list, of another length, or holds another value.
        """
        value = self.value(name)
        if value is None:
            return None
        if not isinstance(value, list | tuple) or len(value) != layers:
            raise self._wrong((name,), f"a list of {layers} entries, one per layer", value)
        for entry in value:
            if entry not in allowed:
                raise ModelError(
                    f"config key {name} has the entry {entry!r}, which is not supported; "
                    f"supported: {', '.join(map(str, allowed))}"
                )
        return tuple(value)

    def token(self, name: str) -> int | None:
        """A token number, None where there is none."""
        tokens = eos_tokens(self.value(name), name)
        if len(tokens) > 1:
            raise self._wrong((name,), "one integer or null", self.value(name))
        return tokens[0] if tokens else None

    def tokens(self, name: str) -> tuple[int, ...]:
        """Token numbers: an integer, a list of them, or null."""
        return eos_tokens(self.value(name), name)

    def only(self, name: str, *allowed: Any) -> None:
        """Refuse `name` if it has a value that is not `allowed`.

        Raises:
            ModelError: it has.
        """
        value = self.value(name)
        if value is not None and not any(_same(value, wanted) for wanted in allowed):
            wanted = " or ".join(repr(entry) for entry in allowed) or "null"
            raise ModelError(
                f"config key {self.show(name)} is not supported for this family; only {wanted} is"
            )

    def finish(self) -> None:
        """Refuse what no family read, unless it is harmless.

        Raises:
            ModelError: a key that is left may change what the model computes.
        """
        for name, allowed in NEUTRAL.items():
            if name not in self._read:
                self.only(name, *allowed)
        for name, reason in CHANGING.items():
            if self.unread(name) is not None:
                raise ModelError(
                    f"config key {self.show(name)} is not supported: it asks for {reason}"
                )
        unknown = [
            self.show(name)
            for name, value in self._values.items()
            if value is not None
            and name not in self._read
            and name not in HARMLESS
            and not name.startswith(HARMLESS_PREFIXES)
            and not name.endswith(HARMLESS_SUFFIXES)
        ]
        if unknown:
            subject = "key" if len(unknown) == 1 else "keys"
            verb = "is" if len(unknown) == 1 else "are"
            raise ModelError(
                f"config {subject} {', '.join(unknown)} {verb} unknown to Quatom for this family "
                "and may change what the model computes; remove from config.json what has no "
                "effect on inference"
            )

    def passed_over(self) -> list[str]:
        """Names that are there and that no family read: harmless ones, and null."""
        return [n for n, v in self._values.items() if n not in self._read or v is None]

    def show(self, name: str) -> str:
        """`name = value`, long values shortened, on one line."""
        return f"{name} = {_short(self._values.get(name))}"

    def under(self, prefix: str) -> tuple[str, ...]:
        """Names that begin with `prefix` and have a value."""
        return tuple(n for n, v in self._values.items() if v is not None and n.startswith(prefix))

    def _says_something(self, name: str) -> bool:
        return self._values.get(name) is not None

    def _absent(self, name: str, default: Any) -> Any:
        self._read.add(name)
        return None if name in self._values else default

    def _wrong(self, names: tuple[str, ...], kind: str, value: Any) -> ModelError:
        name = next((n for n in names if self._values.get(n) is not None), names[0])
        return ModelError(f"config key {name} must be {kind}, got {_short(value)}")


def eos_tokens(value: Any, name: str = "eos_token_id") -> tuple[int, ...]:
    """The tokens of an entry like eos_token_id: an integer, a list of them, or null.

    Raises:
        ModelError: it is something else.
    """
    tokens = () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in tokens):
        raise ModelError(f"{name} must be an integer or a list of integers, got {_short(value)}")
    return tokens


def _leaves(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if name not in _SECTIONS:
            yield name, value
        elif isinstance(value, Mapping):
            yield from _entries(name, value)
        elif value is not None:
            raise ModelError(f"config key {name} must be an object or null, got {_short(value)}")


def _entries(prefix: str, section: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in section.items():
        if isinstance(value, Mapping):
            yield from _entries(f"{prefix}.{name}", value)
        else:
            yield f"{prefix}.{name}", value


def _is_number(value: Any) -> TypeGuard[int | float]:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False


def _same(left: Any, right: Any) -> bool:
    """Equal, where true is not 1."""
    return isinstance(left, bool) == isinstance(right, bool) and bool(left == right)


def _short(value: Any) -> str:
    shortener = Repr()
    shortener.maxstring = shortener.maxother = shortener.maxlong = 60
    return shortener.repr(value)
