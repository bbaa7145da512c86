"""What all layers of a forward pass need alike: made by the first one, kept for the others.

Index tensors, masks and rotary factors depend on the batch alone. A decode step of a small model
on a CPU is made of calls of a few microseconds, and most of those would go to making them anew.
"""

from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
Shared = dict[str, Any]
"""Results by name. One dict belongs to one batch and one model: its tensors must not change."""


def remember(shared: Shared | None, name: str, make: Callable[[], T]) -> T:
    """The result called `name`, made if it is not there; made every time without a dict."""
    if shared is None:
        return make()
    if name not in shared:
        shared[name] = make()
    result: T = shared[name]
    return result
