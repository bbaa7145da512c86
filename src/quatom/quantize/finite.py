"""Hidden states must be numbers: found at the block that breaks them, not at the end of a run."""

import torch
from torch import Tensor

from quatom.errors import QuantizationError


def check_finite_block(hidden: Tensor, index: int, when: str, dtype: torch.dtype) -> None:
    """Raise QuantizationError if the output of a block holds NaN or infinity.

    Args:
        hidden: hidden states after the block.
        index: of the block.
        when: what was run, for the message.
        dtype: of the computation.
    """
    bad = ~torch.isfinite(hidden)
    if not bad.any():
        return
    value, largest = hidden[bad][0].item(), hidden[~bad].abs().max() if not bad.all() else 0.0
    raise QuantizationError(
        f"block {index} gives {value} {when}, {int(bad.sum())} of {hidden.numel()} values in "
        f"{str(dtype).removeprefix('torch.')} (the largest finite one is {float(largest):.3g}): "
        "check the source's weights, or use --dtype float32"
    )
