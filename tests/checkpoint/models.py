"""Random model folders written tensor by tensor, without building a network."""

import json
from pathlib import Path

import torch

from quatom.checkpoint.safetensors_file import write_tensors
from quatom.checkpoint.schema import TensorSpec, checkpoint_tensors
from quatom.families.registry import read_config
from quatom.plan import plan
from quatom.presets import PRESETS

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# The two real models' sizes.
SMOLLM2 = CONFIG | {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
LLAMA_7B = CONFIG | {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}


def random_tensor(name: str, spec: TensorSpec, dtype=torch.float32) -> torch.Tensor:
    """The same numbers for the same name, whatever else is made."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    if spec.dtype == torch.int32:  # an order
        return torch.randperm(spec.shape[0], generator=generator).int()
    if spec.dtype in (torch.uint8, torch.int8):
        return torch.randint(0, 127, spec.shape, generator=generator).to(spec.dtype)
    return torch.randn(spec.shape, generator=generator).to(spec.dtype or dtype)


def write_model(
    folder: Path, config: dict = CONFIG, *, dtype=torch.float32, shards: int = 1, recipe=None
) -> Path:
    """A folder as transformers writes it (without tokenizer): one file, or an index and shards."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    specs = checkpoint_tensors(plan(read_config(config), recipe or PRESETS["fp16"]))
    names = list(specs)
    weight_map = {}
    for shard in range(shards):
        part = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        many = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        file = folder / ("model.safetensors" if shards == 1 else many)
        write_file(file, {name: random_tensor(name, specs[name], dtype) for name in part})
        weight_map |= dict.fromkeys(part, file.name)
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_file(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    """One safetensors file."""
    specs = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    with file.open("wb") as stream:
        write_tensors(stream, specs, tensors.__getitem__)


def replace_tensors(file: Path, **changes: torch.Tensor | None) -> None:
    """Rewrite a file with some tensors changed, added or (None) removed; "__" stands for "."."""
    from safetensors.torch import load

    tensors = load(file.read_bytes()) | {k.replace("__", "."): v for k, v in changes.items()}
    write_file(file, {name: t for name, t in tensors.items() if t is not None})
