"""The tables of angles that the layers of a model turn q and k by."""

import torch
from torch import Tensor, nn

from quatom.families.spec import Attention, ModelConfig, Rope
from quatom.numerics.rotary import rotary_table


class RotaryTables(nn.Module):
    """Cos and sin for every kind of layer: layers of one rotary embedding share a table."""

    def __init__(
        self,
        config: ModelConfig,
        num_positions: int,
        device: torch.device | str = "cpu",
        *,
        max_length: int | None = None,
    ) -> None:
        """Make the tables.

        Args:
            config: the model.
            num_positions: rows of each table.
            device: where they are.
            max_length: longest sequence that will run, which longrope depends on; None:
                num_positions.
        """
        super().__init__()
        self._names: dict[tuple[Rope | None, int], int] = {}
        for layer in config.layers:
            key = (layer.attention.rope, layer.attention.head_dim)
            if key in self._names:
                continue
            number = self._names[key] = len(self._names)
            cos, sin = rotary_table(
                *key, num_positions, max_length=max_length or num_positions, device=device
            )
            self.register_buffer(f"cos_{number}", cos, persistent=False)
            self.register_buffer(f"sin_{number}", sin, persistent=False)

    def of(self, attention: Attention) -> tuple[Tensor, Tensor]:
        """Cos and sin of a layer, each (num_positions, head_dim / 2) float32."""
        number = self._names[attention.rope, attention.head_dim]
        return self.get_buffer(f"cos_{number}"), self.get_buffer(f"sin_{number}")
