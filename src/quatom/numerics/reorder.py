"""The order of a linear's input channels: ascending by score, the outliers last.

Sorting *all* channels, not only moving the outliers after the rest, makes every group
homogeneous in magnitude, so that one scale fits all of its channels.

Source: Atom (Zhao et al., MLSys 2024), channel reordering.
"""

import torch
from torch import Tensor

from quatom.errors import ShapeError


def channel_order(
    scores: Tensor,  # (K,) larger means more important
    num_outliers: int,
    blocks: int = 1,
) -> Tensor:
    """Old channel at each new position, (K,) int64; ascending by score.

    With `blocks` > 1 the input is cut into that many equal blocks, each ordered on its own with
    `num_outliers` outliers of its own: the normal channels of all blocks come first, block by
    block, then the outliers of all blocks.

    Raises:
        ShapeError: the channels do not divide into equal blocks, or a block has fewer channels
            than outliers.
    """
    channels = scores.numel()
    if channels % blocks or channels // blocks <= num_outliers:
        raise ShapeError(
            f"{channels} channels cannot be ordered as {blocks} equal blocks with {num_outliers} "
            "outliers each"
        )
    width = channels // blocks
    # Stable, so that equal scores (dead channels) keep their place and the order is reproducible.
    order = scores.view(blocks, width).argsort(dim=-1, stable=True)
    order = order + torch.arange(blocks, device=scores.device).unsqueeze(1) * width
    normal, outliers = order[:, : width - num_outliers], order[:, width - num_outliers :]
    return torch.cat((normal.flatten(), outliers.flatten()))


def inverse_order(order: Tensor) -> Tensor:  # (K,) -> (K,)
    """New position of each old channel."""
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), dtype=order.dtype, device=order.device)
    return inverse


def check_order(order: Tensor, channels: int, *, repeats: bool = False) -> None:
    """Raise ShapeError unless `order` is a permutation of `channels` channels.

    With `repeats` it is a list of as many channels, which may appear several times or not at all.
    """
    if repeats:
        inside = order.shape == (channels,) and bool(((order >= 0) & (order < channels)).all())
        if not inside:
            raise ShapeError(
                f"order of shape {tuple(order.shape)} is no list of {channels} channels from 0 to "
                f"{channels - 1}"
            )
        return
    if order.shape != (channels,) or not torch.equal(
        order.long().sort().values, torch.arange(channels, device=order.device)
    ):
        raise ShapeError(f"order of shape {tuple(order.shape)} is no permutation of {channels}")


def sliceable_positions(
    channels: int,
    num_outliers: int,  # of each block
    blocks: int,
) -> Tensor:
    """Position in `channel_order` of each entry of the sliceable form, (K,) int64.

    Operations need the outliers of all blocks after all normal channels; a checkpoint that
    tensor-parallel loaders cut into `blocks` equal slices has each block's normal channels
    followed by its own outliers: sliceable = order[sliceable_positions(...)].
    """
    width = channels // blocks
    normal = torch.arange(blocks * (width - num_outliers)).view(blocks, -1)
    outliers = torch.arange(blocks * (width - num_outliers), channels).view(blocks, -1)
    return torch.cat((normal, outliers), dim=1).flatten()
