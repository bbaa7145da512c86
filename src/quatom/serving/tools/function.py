"""Function: what a request offers to be called, checked."""

import re
from dataclasses import dataclass
from typing import Any

from quatom.errors import RequestError

NAME = re.compile(r"[A-Za-z0-9_.\-]{1,64}")
MAX_FUNCTIONS = 128
_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
_OPEN = (
    "additionalProperties",
    "patternProperties",
    "unevaluatedProperties",
    "allOf",
    "anyOf",
    "oneOf",
    "$ref",
)


@dataclass(frozen=True, slots=True)
class Function:
    """A function that a model may call."""

    name: str
    parameters: dict[str, Any]
    """JSON schema of the arguments, as the request has it."""
    strict: bool = False
    """Enforce the schema also where calling is the model's choice."""

    @property
    def schema(self) -> dict[str, Any]:
        """The schema that is enforced: one that names its properties gets no others."""
        if "properties" in self.parameters and not any(key in self.parameters for key in _OPEN):
            return {**self.parameters, "additionalProperties": False}
        return self.parameters


def make_function(name: str, parameters: dict[str, Any] | None, strict: bool | None) -> Function:
    """A checked function.

    Raises:
        RequestError: the name is not allowed, or the parameters are no schema of an object.
    """
    if not NAME.fullmatch(name):
        raise RequestError(
            f"a function is named by 1 to 64 letters, digits, '_', '-' and '.', got {name[:80]!r}"
        )
    schema = parameters or _NO_ARGUMENTS
    kind = schema.get("type", "object")
    if kind != "object":
        raise RequestError(
            f"the parameters of function {name!r} must be the schema of an object, got type "
            f"{kind!r}"
        )
    if not isinstance(schema.get("properties", {}), dict):
        raise RequestError(f"the properties of function {name!r} must be an object")
    return Function(name, {"type": "object", **schema}, bool(strict))


def by_name(functions: list[Function]) -> dict[str, Function]:
    """Functions by name.

    Raises:
        RequestError: there are too many, or two share a name.
    """
    if len(functions) > MAX_FUNCTIONS:
        raise RequestError(f"at most {MAX_FUNCTIONS} tools, got {len(functions)}")
    found: dict[str, Function] = {}
    for function in functions:
        if function.name in found:
            raise RequestError(f"two tools are named {function.name!r}")
        found[function.name] = function
    return found
