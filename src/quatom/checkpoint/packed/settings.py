"""Reading quantization_config strictly: what is not understood is refused by name."""

from collections.abc import Mapping
from typing import Any

from quatom.errors import CheckpointError, RecipeError


def integer(settings: Mapping[str, Any], name: str) -> int:
    """An integer that must be there.

    Raises:
        CheckpointError: it is missing, or something else.
    """
    value = settings.get(name)
    if type(value) is not int:
        raise CheckpointError(
            f"quantization_config has {name} {value!r}, an integer is needed; download the "
            "checkpoint again"
        )
    return value


def refuse(method: str, found: Mapping[str, bool], can: str) -> None:
    """Raise RecipeError with everything in `found` that is true, and what can be imported."""
    if words := [what for what, is_so in found.items() if is_so]:
        raise RecipeError(
            f"{method}: {', '.join(words)} cannot be imported without rounding again; {can} can: "
            "quantize the floating-point model instead"
        )
