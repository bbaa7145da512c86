"""What kernels ask for ahead of the kernels after them.

A decode step of few sequences is a chain of short kernels, of which only the linears read much. The
others, and the ends of linears, leave the memory idle: meanwhile the weights of the next linears
come into the L2 cache. `fetch_ahead` in device.cuh asks for them.
"""

from torch import Tensor

PIECE = 16384
"""Bytes of a piece, as in device.cuh."""
TOKENS = 64
"""Tokens of a step up to which weights are asked for ahead: more keep the memory busy."""


def count_pieces(tensor: Tensor, most_bytes: int) -> int:
    """Whole pieces of the first `most_bytes` bytes of a contiguous tensor."""
    return min(tensor.nbytes, most_bytes) // PIECE
