"""A model of random weights as `quantize_checkpoint` reads one: time and memory without a download.

Nothing is stored: every tensor is drawn when it is read, on the device that will quantize it, and
handed over on the CPU, where a file's tensors come from too.
"""

import zlib
from pathlib import Path

import torch
from torch import Tensor

from quatom.benchmark.model_shapes import SHAPES, find_shape
from quatom.benchmark.random_weights import outer_std
from quatom.checkpoint.reader import TensorSource
from quatom.checkpoint.schema import TensorSpec, checkpoint_tensors
from quatom.families.spec import ModelConfig
from quatom.placement import usable_device
from quatom.plan import plan
from quatom.presets import PRESETS
from quatom.recipe import CalibrationSpec


def random_source(
    shape: str,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> TensorSource:
    """Random weights (see `random_weights`), norms of ones, in the sizes called `shape`.

    Args:
        shape: a name in `quatom.benchmark.random_weights.SHAPES`.
        device: where numbers are drawn, None as in `quatom.load`; a GPU draws a 7B block in
            milliseconds.
        dtype: of all tensors.
        seed: same seed, shape and device: same weights.

    Raises:
        ModelError: there is no such shape.
        BackendError: the device is not available.
    """
    config = find_shape(shape)
    place = usable_device(device)
    expected = checkpoint_tensors(plan(config, PRESETS["fp16"]))
    specs = {name: TensorSpec(spec.shape, dtype) for name, spec in expected.items()}
    origin = Path(f"random-{shape}")

    def read(name: str) -> Tensor:
        spec = specs[name]
        if len(spec.shape) == 1 and name.endswith("norm.weight"):
            return torch.ones(spec.shape, dtype=dtype)
        # Not hash(): Python salts that of a string anew in every process.
        generator = torch.Generator(place).manual_seed(seed + zlib.crc32(name.encode()))
        drawn = torch.empty(spec.shape, dtype=dtype, device=place)
        return drawn.normal_(0.0, outer_std(config, name), generator=generator).cpu()

    return TensorSource(
        folder=origin,
        config_dict=dict(SHAPES[shape]),
        model_config=config,
        recipe=None,
        gguf=None,
        _files=(),
        _tensors=specs,
        _read=read,
        _locate=lambda name: origin,
    )


def random_tokens(config: ModelConfig, spec: CalibrationSpec) -> Tensor:
    """Uniform token ids, (num_samples, sequence_length) int64."""
    generator = torch.Generator().manual_seed(spec.seed)
    size = (spec.num_samples, spec.sequence_length)
    return torch.randint(0, config.vocab_size, size, generator=generator)
