"""How tokens are routed, and their slots sorted by expert."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Routing:
    """Experts of each token and their shares in its result."""

    expert_ids: Tensor  # (T, k) int32
    weights: Tensor  # (T, k) float32


@dataclass(frozen=True, slots=True)
class TokenGroups:
    """Slots t * k + j sorted by expert, those of one expert in ascending order."""

    slots: Tensor  # (T k,) int32: the slot at each grouped position
    offsets: Tensor  # (E + 1,) int32: expert e has positions offsets[e] to offsets[e + 1]
    positions: Tensor  # (T k,) int32: the grouped position of each slot
    tiles: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    """By rows of a tile: how the Hopper kernel cuts rows that are in grouped order, where an
    earlier product of these groups has prepared it."""

    @property
    def num_experts(self) -> int:
        """E."""
        return self.offsets.numel() - 1
