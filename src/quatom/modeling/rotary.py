"""The tables that the layers of a model turn q and k by, and multiply q by."""

from typing import cast

import torch
from torch import Tensor, nn

from quatom.families.spec import ModelConfig, QueryGrowth, Rope
from quatom.numerics.rotary import query_scales, rotary_table


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
                num_positions. Where no query grows up to there, none is multiplied.
        """
        super().__init__()
        max_length = max_length or num_positions
        names: dict[tuple[Rope | None, int], tuple[str, str]] = {}
        # Found once: comparing rotary embeddings takes longer than many a kernel's launch.
        self._names_by_layer: list[tuple[str, str]] = []
        for layer in config.layers:
            key = (layer.attention.rope, layer.attention.head_dim)
            if key not in names:
                names[key] = (f"cos_{len(names)}", f"sin_{len(names)}")
                turns = rotary_table(*key, num_positions, max_length=max_length, device=device)
                for name, part in zip(names[key], turns, strict=True):
                    self.register_buffer(name, part, persistent=False)
            self._names_by_layer.append(names[key])
        self._scales_by_layer: list[str] = []
        scales: dict[QueryGrowth | None, str] = {}
        for layer in config.layers:
            growth = layer.attention.query_growth
            if growth not in scales:
                scales[growth] = f"scales_{len(scales)}"
                table = query_scales(growth, num_positions, max_length=max_length, device=device)
                self.register_buffer(scales[growth], table, persistent=False)
            self._scales_by_layer.append(scales[growth])

    def of(self, layer: int) -> tuple[Tensor, Tensor]:
        """Cos and sin of layer number `layer`, each (num_positions, head_dim / 2) float32."""
        cos, sin = self._names_by_layer[layer]
        return cast("Tensor", self._buffers[cos]), cast("Tensor", self._buffers[sin])

    def query_scales(self, layer: int) -> Tensor | None:
        """Factor of each position's turned query in layer number `layer`; None: all are 1.

        (num_positions,) float32.
        """
        return self._buffers[self._scales_by_layer[layer]]
