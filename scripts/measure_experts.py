"""What orders per expert and blended statistics bring on a planted mixture of experts.

Prints the tables of docs/lab/accuracy.md. Run from the root of the repository:

    python scripts/measure_experts.py
"""

import sys
import tempfile
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.quantize.planted_experts import (
    RARE,
    planted,
    quantization_error,
    random_hidden,
    with_bound,
)

from quatom.presets import PRESETS


class Texts(TypedDict):
    """Hidden states of a measurement."""

    calibration: Tensor
    held_out: Tensor


RECIPES = ("atom-w4a4kv4", "quatom-w4a4kv4", "quatom-w4a8kv4")


@torch.no_grad()
def main() -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder:
        model = planted(Path(folder) / "even")
        text = Texts(calibration=random_hidden(2048, 1), held_out=random_hidden(512, 2))
        for name in RECIPES:
            kinds = ("per expert", "per layer", "expert 0's")
            errors = [quantization_error(model, PRESETS[name], order=k, **text) for k in kinds]
            print(f"| `{name}` | {' | '.join(f'{error:.3f}' for error in errors)} |")
        model = planted(Path(folder) / "rare", rarity=1.0)
        text = Texts(calibration=random_hidden(512, 1), held_out=random_hidden(8192, 2))
        for name in RECIPES:
            recipes = [with_bound(PRESETS[name], bound) for bound in (1, 128, 512, 1024)]
            errors = [quantization_error(model, r, of_expert=RARE, **text) for r in recipes]
            print(f"| `{name}` | {' | '.join(f'{error:.3f}' for error in errors)} |")


if __name__ == "__main__":
    main()
