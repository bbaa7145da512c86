"""Tiny models as other quantizers write them, beside the same model in floating point.

Words are packed here with numpy, code by code, and weights are computed by the formula of each
format: nothing of `quatom` takes part.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

NO_LINEARS = ("norm", "gate.weight", "router", "embed", "lm_head")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Grid:
    """Of one linear, as the tool found it."""

    codes: np.ndarray  # (N, K) from 0 on
    scales: np.ndarray  # (N, G) float16
    zeros: np.ndarray  # (N, G)
    groups: np.ndarray  # (K,)

    @property
    def weight(self) -> torch.Tensor:
        """(N, K) float32."""
        at = self.groups
        real = (self.codes - self.zeros[:, at]) * self.scales.astype(np.float32)[:, at]
        return torch.from_numpy(real.astype(np.float32))


def is_linear(name: str) -> bool:
    """Whether a weight is one of a decoder linear; biases, norms and routers are none."""
    return name.endswith(".weight") and not any(part in name for part in NO_LINEARS)


def random_grid(
    name: str,
    shape: tuple[int, int],
    *,
    bits: int = 4,
    group: int = 128,
    symmetric: bool = True,
    act_order: bool = False,
) -> Grid:
    """Codes that take every value. Linears that share an input share the order of its channels."""
    rows, channels = shape
    random = np.random.default_rng(sum(name.encode()))
    count = 1 if group == -1 else -(-channels // group)
    zeros = np.full((rows, count), 1 << (bits - 1))
    if not symmetric:
        zeros = random.integers(0, 1 << bits, (rows, count))
    groups = np.arange(channels) // (channels if group == -1 else group)
    if act_order:
        groups = groups[np.random.default_rng(_order_seed(name, channels)).permutation(channels)]
    scales = (random.uniform(0.5, 1.5, (rows, count)) * 0.16 / (1 << bits)).astype(np.float16)
    codes = random.integers(0, 1 << bits, shape)
    return Grid(codes, scales, zeros, groups)


def _order_seed(name: str, channels: int) -> int:
    """The same for linears that share an input; the last one of each expert reads its own."""
    own = name.endswith(".w2") or ("experts." in name and name.endswith(".down_proj"))
    return channels + ("o_proj" in name) + (sum(name.encode()) if own else 0)


def words(codes: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Codes (..., C) in 32-bit words (..., C * bits / 32)."""
    each = 32 // bits
    parts = codes.reshape(*codes.shape[:-1], -1, each)
    packed = np.zeros(parts.shape[:-1], dtype=np.uint64)
    for place, code in enumerate(order or range(each)):
        packed |= parts[..., code].astype(np.uint64) << np.uint64(place * bits)
    return torch.from_numpy(packed.astype(np.uint32).view(np.int32))


def gptq_tensors(grid: Grid, bits: int, version: str) -> dict[str, torch.Tensor]:
    stored_zeros = grid.zeros.T - (version == "gptq")
    return {
        "qweight": words(grid.codes, bits).t().contiguous(),
        "qzeros": words(stored_zeros, bits),
        "scales": torch.from_numpy(grid.scales.T.copy()),
        "g_idx": torch.from_numpy(grid.groups.astype(np.int32)),
    }


def awq_tensors(grid: Grid) -> dict[str, torch.Tensor]:
    return {
        "qweight": words(grid.codes.T, 4, AWQ_ORDER),
        "qzeros": words(grid.zeros.T, 4, AWQ_ORDER),
        "scales": torch.from_numpy(grid.scales.T.copy()),
    }


def write_folders(
    source: Path,
    folder: Path,
    quantization: dict,
    store: Callable[[str, torch.Tensor], tuple[dict[str, torch.Tensor], torch.Tensor]],
) -> tuple[Path, Path]:
    """A quantized folder and one in floating point, from a float model.

    Args:
        source: the float model, which gives all that is not quantized.
        folder: where both are made.
        quantization: quantization_config.
        store: from name and weight of a linear to its stored tensors, and the real weight.
    """
    packed, plain = folder / "packed", folder / "plain"
    for target in (packed, plain):
        shutil.copytree(source, target)
    tensors, real = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if not is_linear(name):
            tensors[name] = real[name] = tensor
            continue
        prefix = name.removesuffix(".weight")
        own, real[name] = store(prefix, tensor)
        tensors |= {f"{prefix}.{part}": held.contiguous() for part, held in own.items()}
    save_file(tensors, packed / "model.safetensors")
    save_file(real, plain / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return packed, plain


def gptq_folders(
    source: Path, folder: Path, *, version: str = "gptq", bits: int = 4, group: int = 128, **grid
) -> tuple[Path, Path]:
    """A checkpoint of GPTQModel, and the same in floating point."""
    quantization = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": grid.get("act_order", False),
        "sym": grid.get("symmetric", True),
        "checkpoint_format": version,
    }

    def store(name, weight):
        made = random_grid(name, tuple(weight.shape), bits=bits, group=group, **grid)
        if version == "gptq":  # a stored zero point of -1 would not fit
            made.zeros[made.zeros == 0] = 1
        return gptq_tensors(made, bits, version), made.weight

    return write_folders(source, folder, quantization, store)


def awq_folders(source: Path, folder: Path, *, group: int = 128) -> tuple[Path, Path]:
    """A checkpoint of AutoAWQ, and the same in floating point."""
    quantization = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "zero_point": True,
        "version": "gemm",
    }

    def store(name, weight):
        made = random_grid(name, tuple(weight.shape), group=group, symmetric=False)
        return awq_tensors(made), made.weight

    return write_folders(source, folder, quantization, store)
