"""A model of random weights as `quantize_checkpoint` reads one: time and memory without a download.

Nothing is stored: every tensor is drawn when it is read, on the device that will quantize it, and
handed over on the CPU, where a file's tensors come from too.
"""

import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quatom.benchmark.model_shapes import find_shape
from quatom.benchmark.random_weights import STD
from quatom.checkpoint.reader import TensorSource
from quatom.checkpoint.schema import TensorSpec, float_tensors
from quatom.errors import ModelError
from quatom.loading import usable_device
from quatom.modeling.config import ModelConfig
from quatom.recipe import CalibrationSpec


def random_source(
    shape: str,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> TensorSource:
    """Weights of standard deviation `STD`, norms of ones, in the sizes called `shape`.

    Args:
        shape: a name in `quatom.benchmark.random_weights.SHAPES`.
        device: where numbers are drawn: a GPU draws a 7B block in milliseconds.
        dtype: of all tensors.
        seed: same seed, shape and device: same weights.

    Raises:
        ModelError: there is no such shape.
        BackendError: the device is not available.
    """
    config = find_shape(shape)
    place = usable_device(device)
    specs = {name: TensorSpec(s.shape, dtype) for name, s in float_tensors(config).items()}
    origin = Path(f"random-{shape}")

    def read(name: str) -> Tensor:
        spec = specs[name]
        if len(spec.shape) == 1 and name.endswith("norm.weight"):
            return torch.ones(spec.shape, dtype=dtype)
        # Not hash(): Python salts that of a string anew in every process.
        generator = torch.Generator(place).manual_seed(seed + zlib.crc32(name.encode()))
        drawn = torch.empty(spec.shape, dtype=dtype, device=place)
        return drawn.normal_(0.0, STD, generator=generator).cpu()

    return TensorSource(
        folder=origin,
        config_dict=_config_dict(config),
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


def _config_dict(config: ModelConfig) -> dict[str, Any]:
    """The config.json from which a checkpoint of this model reads the same sizes."""
    described = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
    }
    if ModelConfig.from_hf(described) != config:
        raise ModelError(
            f"random weights of architecture {config.architecture} cannot be described"
        )
    return described
