"""Weights in a layout of a CPU library's own, as arguments of a torch operator.

On a CPU with AVX-512 VNNI, oneDNN packs weights into tensors without storage that torch can see.
No operator of ours is found for them, and torch.compile cannot trace them. So an operator gets a
number in place of such a tensor.
"""

from collections.abc import Sequence
from itertools import count
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

_numbers = count()
_packed: WeakValueDictionary[int, Tensor] = WeakValueDictionary()


def is_opaque(tensor: Tensor) -> bool:
    """Whether torch cannot see the memory of a tensor."""
    return tensor.layout is not torch.strided


def as_argument(tensor: Tensor) -> Tensor:
    """The tensor itself, or a number for an opaque one: (1,) int64.

    The caller keeps the opaque tensor alive as long as the number is used.
    """
    if not is_opaque(tensor):
        return tensor
    number = next(_numbers)
    _packed[number] = tensor
    return torch.tensor([number])


def hold(layer: nn.Module, name: str, tensors: Sequence[Tensor]) -> list[str]:
    """Make parameters NAME_0, NAME_1 and so on of weight tensors, as an operator gets them.

    Returns their names. The layer keeps the opaque ones alive.
    """
    setattr(layer, f"{name}_opaque", [tensor for tensor in tensors if is_opaque(tensor)])
    names = [f"{name}_{number}" for number in range(len(tensors))]
    for own, tensor in zip(names, tensors, strict=True):
        layer.register_parameter(own, nn.Parameter(as_argument(tensor), requires_grad=False))
    return names


def from_arguments(arguments: Sequence[Tensor], opaque: Sequence[bool]) -> tuple[Tensor, ...]:
    """The tensors that `as_argument` took; `opaque` says which of them are numbers."""
    return tuple(
        _packed[int(argument)] if packed else argument
        for argument, packed in zip(arguments, opaque, strict=True)
    )
