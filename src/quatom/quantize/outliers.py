"""Activation outliers of a floating-point model: the magnitude of each input channel of a block.

The figure that motivates Atom: a few channels are far larger than the rest; sorted by their second
moment they are together at the end, where INT8 keeps them.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quatom.checkpoint.reader import TensorSource
from quatom.errors import ModelError
from quatom.families.spec import SITES, SiteName
from quatom.loading import load_float_layer
from quatom.modeling.build import build_block
from quatom.modeling.rotary import RotaryTables
from quatom.numerics.reorder import channel_order
from quatom.plan import plan
from quatom.presets import PRESETS
from quatom.quantize.statistics import ChannelScores, observe, run_block
from quatom.quantize.walk import embed


@dataclass(frozen=True, slots=True)
class ChannelMagnitudes:
    """Inputs of one site of a block, by channel."""

    site: SiteName
    """The linears that share the input. That of experts' down projections counts all experts."""
    absmax: Tensor  # (K,) float32, largest magnitude
    second_moment: Tensor  # (K,) float32, mean square

    @property
    def order(self) -> Tensor:  # (K,) int64
        """Channels by ascending second moment."""
        return channel_order(self.second_moment, 0)

    @property
    def largest_over_median(self) -> float:
        """Largest channel's magnitude over the median channel's."""
        return float(self.absmax.max() / self.absmax.median())


@torch.no_grad()
def channel_magnitudes(
    source: TensorSource,
    tokens: Tensor,  # (sequences, length) int64
    layer: int,
    device: torch.device,
) -> list[ChannelMagnitudes]:
    """Run the blocks up to `layer` in float32 and measure the inputs of its sites.

    Raises:
        ModelError: there is no such layer.
    """
    config = source.model_config
    if not 0 <= layer < config.num_layers:
        raise ModelError(
            f"layer {layer} does not exist: the model has 0 to {config.num_layers - 1}"
        )
    hidden = embed(source, tokens, device, torch.float32)
    rotary = RotaryTables(config, tokens.shape[1], device)
    largest, squares = ChannelScores("absmax"), ChannelScores("second_moment")

    def see(site: SiteName, x: Tensor) -> None:
        largest.add(site, x)
        squares.add(site, x)

    for spec in plan(config, PRESETS["fp16"]).layers[: layer + 1]:
        block = build_block(spec, load_float_layer(source, spec, device, torch.float32))
        if spec.index < layer:
            hidden = run_block(block, hidden, rotary)
            continue
        with observe(block, see):
            run_block(block, hidden, rotary)
    count = tokens.numel()
    return [
        ChannelMagnitudes(site, largest.sums[site], squares.sums[site] / count)
        for site in SITES
        if site in largest.sums
    ]


def plot_magnitudes(measured: list[ChannelMagnitudes], title: str, path: Path) -> None:
    """The poster's figure: channel magnitudes as they come, and after reordering."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(measured), 2, figsize=(10, 2.2 * len(measured)), sharey="row", squeeze=False
    )
    for row, magnitudes in zip(axes, measured, strict=True):
        row[0].plot(magnitudes.absmax.cpu().numpy(), linewidth=0.7)
        row[1].plot(magnitudes.absmax[magnitudes.order].cpu().numpy(), linewidth=0.7)
        row[0].set_ylabel(f"{magnitudes.site}\nlargest |x|")
    axes[0][0].set_title("channels as they come")
    axes[0][1].set_title("channels by second moment")
    for axis in axes[-1]:
        axis.set_xlabel("channel")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
