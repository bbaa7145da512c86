"""Will it fit? Bytes of weights and KV cache of a model under a recipe, beside a GPU's memory.

This is arithmetic on config.json. Nothing is loaded or measured.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from quatom.benchmark.roofline import Ceilings
from quatom.checkpoint.schema import checkpoint_tensors
from quatom.errors import ModelError, unknown
from quatom.families.spec import ModelConfig
from quatom.numerics.kv_pages import bytes_per_token_head
from quatom.plan import ModelPlan, plan
from quatom.recipe import Recipe

GIB = 2**30
USABLE = 0.9
"""Share of the memory for weights and KV cache, `EngineConfig.memory_fraction`: the rest is for
activations, the CUDA context and graphs."""
FLOAT = torch.float16
"""What is not quantized has two bytes per number."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU that a user may name."""

    memory_gib: float
    tested: bool
    """Whether Quatom's results include this GPU."""
    ceilings: Ceilings | None = None
    """Rates of the data sheet; None: not known."""


GPUS: Mapping[str, Gpu] = {
    "H200": Gpu(139.8, True, Ceilings(4.8, 989, 1979)),
    "H100": Gpu(79.2, True, Ceilings(3.35, 989, 1979)),
    "A100-80GB": Gpu(79.2, False, Ceilings(2.039, 312, 624)),
    "A100-40GB": Gpu(39.4, False, Ceilings(1.555, 312, 624)),
    "L40S": Gpu(44.5, False, Ceilings(0.864, 362, 733)),
    "RTX5090": Gpu(31.8, False, Ceilings(1.792, 209, 419)),
    "RTX4090": Gpu(23.5, False, Ceilings(1.008, 165, 330)),
    "L4": Gpu(22.0, False, Ceilings(0.3, 121, 242)),
}
"""Memory that the driver reports, in GiB, rounded down; bandwidth in TB/s and dense matrix rates of
16 and of 8 bits with 32-bit sums, in TFLOPS.

Source: NVIDIA's data sheets, the SXM versions of H200, H100 and A100.
"""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What a model takes under a recipe."""

    weight_bytes: int
    """All tensors: decoder, embedding, output head, norms."""
    kv_bytes_per_token: int
    """K and V of one token in all layers."""
    budget_bytes: int
    """Memory for weights and KV cache."""

    @property
    def fits(self) -> bool:
        """Whether the weights fit at all."""
        return self.weight_bytes < self.budget_bytes

    @property
    def kv_tokens(self) -> int:
        """Tokens that the rest of the budget caches."""
        return max(0, self.budget_bytes - self.weight_bytes) // self.kv_bytes_per_token

    def sequences(self, length: int) -> int:
        """Sequences of `length` tokens that are cached at once."""
        return self.kv_tokens // length


def find_gpu(name: str) -> Gpu:
    """The GPU called `name`, in any case.

    Raises:
        ModelError: it is not in `GPUS`.
    """
    known = {key.lower(): gpu for key, gpu in GPUS.items()}
    if name.lower() not in known:
        raise ModelError(f"{unknown('GPU', name, GPUS)}; or give its memory with --gpu-memory")
    return known[name.lower()]


def plan_memory(config: ModelConfig, recipe: Recipe, memory_gib: float) -> MemoryPlan:
    """What `config` takes under `recipe` on a GPU with `memory_gib` GiB.

    Raises:
        RecipeError: the recipe does not fit the model's sizes.
    """
    resolved = plan(config, recipe)
    bits = sum(spec.bits(FLOAT) for spec in checkpoint_tensors(resolved).values())
    return MemoryPlan(
        weight_bytes=bits // 8,
        kv_bytes_per_token=_kv_bytes_per_token(resolved),
        budget_bytes=int(memory_gib * GIB * USABLE),
    )


def _kv_bytes_per_token(resolved: ModelPlan) -> int:
    layers = [(layer.spec.attention, layer.kv_cache.format) for layer in resolved.layers]
    return sum(a.num_kv_heads * bytes_per_token_head(a.head_dim, dtype) for a, dtype in layers)
