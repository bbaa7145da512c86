"""A GGUF file seen as a Hugging Face model: config.json and tensor names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quatom.checkpoint.gguf_families import GGUF_FAMILIES, GGUFFamily
from quatom.checkpoint.gguf_file import GGUFFile, read_gguf_tensor
from quatom.checkpoint.gguf_rope import ROPE_TABLE, llama3_scaling, table_scaling
from quatom.errors import CheckpointError, ModelError

_GLOBAL_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
IGNORED = (ROPE_TABLE,)
"""Tensors that are no part of the network: read into the configuration."""


def find_family(file: GGUFFile) -> GGUFFamily:
    """The family of a file.

    Raises:
        ModelError: it is not supported.
    """
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in GGUF_FAMILIES:
        raise ModelError(
            f"{file.path}: general.architecture {architecture!r} is not supported; supported: "
            f"{', '.join(GGUF_FAMILIES)}"
        )
    return GGUF_FAMILIES[architecture]


def hf_names(file: GGUFFile) -> dict[str, str]:
    """Hugging Face's name of every tensor, to the file's; unknown names stay as they are."""
    names = find_family(file).names
    return {hf_name(name, names): name for name in file.tensors}


def hf_name(name: str, names: Mapping[str, str]) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight."""
    prefix, _, suffix = name.rpartition(".")
    if prefix in _GLOBAL_NAMES:
        return f"{_GLOBAL_NAMES[prefix]}.{suffix}"
    parts = prefix.split(".")
    if len(parts) == 3 and parts[0] == "blk" and parts[2] in names:
        return f"model.layers.{parts[1]}.{names[parts[2]]}.{suffix}"
    return name


def read_as_hf(file: GGUFFile, name: str, own_name: str) -> Tensor:
    """A tensor, float32, as Hugging Face's file holds it.

    Args:
        file: the file.
        name: Hugging Face's name of the tensor.
        own_name: the file's: see `hf_names`.
    """
    family = find_family(file)
    tensor = read_gguf_tensor(file.tensors[own_name])
    kind = name.split(".")[-2]
    if family.norm_offset and kind.endswith("norm"):
        return tensor - family.norm_offset
    if not family.interleaved or kind not in ("q_proj", "k_proj"):
        return tensor
    prefix = f"{file.metadata['general.architecture']}.attention"
    heads = file.metadata[f"{prefix}.head_count"]
    if kind == "k_proj":
        heads = file.metadata.get(f"{prefix}.head_count_kv", heads)
    pairs = tensor.unflatten(0, (heads, -1, 2))  # (heads, head_dim / 2, 2, ...)
    return pairs.transpose(1, 2).reshape(tensor.shape).contiguous()


def hf_config(file: GGUFFile) -> dict[str, Any]:
    """The config.json of the model in the file.

    Raises:
        CheckpointError: the file lacks metadata, or they are of a wrong type.
        ModelError: the architecture, or something the metadata asks for, is not supported.
    """
    metadata = file.metadata
    family = find_family(file)
    architecture = metadata["general.architecture"]
    prefix = f"{architecture}."
    sizes = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
    try:
        config = _sizes(file.path, sizes)
        config["vocab_size"] = file.tensors["token_embd.weight"].shape[0]
    except KeyError as error:
        raise CheckpointError(
            f"{file.path} lacks {error.args[0]!r}; convert the model to GGUF again"
        ) from error
    except (TypeError, ArithmeticError) as error:  # lists of one value for each layer, or damage
        raise ModelError(
            f"{file.path}: {prefix}attention.head_count and its like must be one positive integer "
            f"for all layers ({error})"
        ) from error
    scaling, factor = sizes.pop("rope.scaling.type", "none"), sizes.pop("rope.scaling.factor", 1.0)
    sizes.pop("rope.scaling.original_context_length", None)  # not used by none and linear
    if scaling == "linear":
        config["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    elif scaling != "none":
        raise ModelError(
            f"{file.path}: rope.scaling.type {scaling!r} is not supported; none and linear are"
        )
    if ROPE_TABLE in file.tensors:
        config["rope_scaling"] = _table_scaling(file, config, scaling)
    config |= {key: sizes.pop(name) for name, key in family.keys.items() if name in sizes}
    if family.score_scale_key is not None:
        config[family.score_scale_key] = config["head_dim"]
    if sizes:
        raise ModelError(
            f"{file.path}: metadata {sorted(prefix + k for k in sizes)} is unknown to Quatom and "
            "may change what the model computes; use the model's safetensors folder"
        )
    if architecture == "llama":
        biases = {n.split(".")[2] for n in file.tensors if n.endswith(".bias") and "blk." in n}
        config["attention_bias"] = "attn_q" in biases
        config["mlp_bias"] = "ffn_gate" in biases
    described = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "torch_dtype": "float32",
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _eos(metadata),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }
    return config | described | dict(family.constants)


def _sizes(path: Path, sizes: dict[str, Any]) -> dict[str, Any]:
    """Move what config.json needs out of `sizes`; the rest is left there."""
    sizes.pop("vocab_size", None)  # the embedding's own rows count
    heads = sizes.pop("attention.head_count")
    hidden = sizes.pop("embedding_length")
    head_dim = sizes.pop("attention.key_length", hidden // heads)
    rotary, value_dim = (
        sizes.pop("rope.dimension_count", head_dim),
        sizes.pop("attention.value_length", head_dim),
    )
    if rotary != head_dim or value_dim != head_dim:
        raise ModelError(
            f"{path}: rotary embedding of {rotary} and values of {value_dim} of {head_dim} "
            "channels per head are not supported; all must be equal"
        )
    return {
        "hidden_size": hidden,
        "intermediate_size": sizes.pop("feed_forward_length"),
        "num_hidden_layers": sizes.pop("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": sizes.pop("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": sizes.pop("attention.layer_norm_rms_epsilon"),
        "rope_theta": sizes.pop("rope.freq_base", 10000.0),
        "max_position_embeddings": sizes.pop("context_length"),
    }


def _table_scaling(file: GGUFFile, config: dict[str, Any], scaling: str) -> dict[str, Any] | None:
    """The rope_scaling entry that a table of frequency divisors stands for."""
    table = read_gguf_tensor(file.tensors[ROPE_TABLE])
    if scaling != "none" or table.shape != (config["head_dim"] // 2,):
        raise ModelError(
            f"{file.path}: {ROPE_TABLE} of shape {tuple(table.shape)} beside rope.scaling.type "
            f"{scaling!r} is not supported; use the model's safetensors folder"
        )
    if bool((table == 1.0).all()):
        return None
    if not bool((torch.isfinite(table) & (table > 0)).all()):
        raise CheckpointError(
            f"{file.path}: {ROPE_TABLE} divides rotary frequencies by {table.min():.4g} to "
            f"{table.max():.4g}, which must be positive numbers; download the file again"
        )
    return llama3_scaling(table, config["rope_theta"]) or table_scaling(
        table, config["max_position_embeddings"]
    )


def _eos(metadata: dict[str, Any]) -> int | list[int] | None:
    """End of text, and end of turn where the file names another token for it."""
    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    tokens: list[Any] = []
    for key in keys:
        if key in metadata and metadata[key] not in tokens:
            tokens.append(metadata[key])
    return tokens if len(tokens) > 1 else tokens[0] if tokens else None
