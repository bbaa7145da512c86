"""What layers of a forward pass need alike: made by the first one, kept for the others.

Index tensors, masks and rotary factors depend on the batch, and on options that may differ from
layer to layer. A decode step of a small model on a CPU is made of calls of a few microseconds, and
most of those would go to making them anew.
"""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from torch import Tensor

from quatom.numerics.kv_pages import KVPages

T = TypeVar("T")
Shared = dict[Hashable, Any]
"""Results by what they are made of. One dict belongs to one batch: its tensors must not change."""


class SameTensor:
    """A tensor as part of a key: equal to itself alone, whatever its values."""

    __slots__ = ("_tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor  # held, so that no other tensor takes its identity

    def __hash__(self) -> int:
        return id(self._tensor)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SameTensor) and self._tensor is other._tensor


def geometry(pages: KVPages) -> Hashable:
    """What places in the pages depend on, for a key."""
    return pages.dtype, pages.block_size, pages.num_kv_heads, pages.head_dim


def rotary_key(tables: tuple[Tensor, Tensor] | None) -> Hashable:
    """Which cos and sin tables, for a key."""
    return tables and tuple(map(SameTensor, tables))


def remember(shared: Shared | None, key: Hashable, make: Callable[[], T]) -> T:
    """The result of `key`, made if it is not there; made every time without a dict.

    The key names the result and every option that it depends on.
    """
    if shared is None:
        return make()
    if key not in shared:
        shared[key] = make()
    result: T = shared[key]
    return result
