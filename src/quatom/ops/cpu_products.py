"""Float matrix products on a CPU whose rows do not depend on how many there are.

MKL picks its kernel, and with it the order in which a row is summed, by the shape. Measured on 7
shapes, K 64 to 4096: with 1 thread 1, 2 and 3 rows differ and all of 4 to 2048 agree; with 2
threads 1-3, 5-7 and 9-11 differ. So products of few rows are filled up, to shapes that agree.
"""

import torch
from torch import Tensor

ROWS_A_THREAD = 4
FILLED_ROWS = 4 * ROWS_A_THREAD
"""Rows a thread from which on a product is not filled up."""
HEAD_ROWS = 8
MAX_HEAD_ROWS = 64
"""Rows up to which `head_product` is meant to be used: it takes HEAD_ROWS at a time."""


def filled_linear(
    x: Tensor,  # (T, K)
    weight: Tensor,  # (N, K)
    bias: Tensor | None = None,  # (N,)
) -> Tensor:
    """X W^T + b, (T, N). On a CPU a row gives the same bits whatever T is."""
    rows, threads = x.shape[0], torch.get_num_threads()
    missing = -rows % (ROWS_A_THREAD * threads)
    if x.device.type != "cpu" or not missing or rows >= FILLED_ROWS * threads:
        return torch.nn.functional.linear(x, weight, bias)
    filled = torch.nn.functional.pad(x, (0, 0, 0, missing))
    return torch.nn.functional.linear(filled, weight, bias)[:rows]


def head_product(
    hidden: Tensor,  # (M, K), few rows
    weight: Tensor,  # (N, K), many rows
) -> Tensor:
    """Hidden W^T, (M, N), HEAD_ROWS rows at a time: a row gives the same bits whatever M is.

    With the weight as the left operand MKL reads it once at the speed of memory: 8 rows by 49152 x
    576 take 7 ms instead of 24 (2 threads), 1 row 7 instead of 12.
    """
    rows = hidden.shape[0]
    filled = torch.nn.functional.pad(hidden, (0, 0, 0, -rows % HEAD_ROWS))
    out = hidden.new_empty(filled.shape[0], weight.shape[0])
    for target, piece in zip(out.split(HEAD_ROWS), filled.split(HEAD_ROWS), strict=True):
        target.copy_((weight @ piece.t()).t())
    return out[:rows]
