"""Tiny GGUF files, written by the gguf package the way llama.cpp's converter does."""

from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize

from quatom.checkpoint.gguf_families import GGUF_FAMILIES
from quatom.checkpoint.gguf_model import hf_name
from quatom.checkpoint.schema import checkpoint_tensors
from quatom.families.registry import read_config
from quatom.plan import plan
from quatom.presets import PRESETS
from tests.checkpoint.models import CONFIG, random_tensor

BASE = {
    "block_count": 2,
    "context_length": 128,
    "embedding_length": 128,
    "feed_forward_length": 160,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "rope.freq_base": 50000.0,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.dimension_count": 32,
}
GLOBAL = ["token_embd.weight", "output_norm.weight", "output.weight"]
BLOCK = ["attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate"]
BLOCK = [f"{name}.weight" for name in [*BLOCK, "ffn_up", "ffn_down"]]
BIASES = ["attn_q.bias", "attn_k.bias", "attn_v.bias"]

# "<s>" bos, "</s>" eos, then a byte alphabet that covers the tests' text, then merges of digits.
WORDS = ["<s>", "</s>", *"abcdefgh 0123456789".replace(" ", "\u0120"), "12", "123", "\u01201"]
MERGES = ["\u0120 1", "1 2", "12 3"]

NAMES = GGUF_FAMILIES["llama"].names


def interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows as llama.cpp wants them: row j of a head's first half beside row j of its second."""
    halves = weight.unflatten(0, (heads, 2, -1))
    return torch.stack((halves[:, 0], halves[:, 1]), dim=2).reshape(weight.shape)


def write_gguf(
    path: Path,
    *,
    architecture: str = "llama",
    quantization: GGMLQuantizationType = GGMLQuantizationType.F32,
    tied: bool = False,
    pre: str | None = "smollm",
    tokenizer: dict | None = None,
    change: dict | None = None,
    extra: dict[str, torch.Tensor] | None = None,
    drop: str | None = None,
) -> dict[str, torch.Tensor]:
    """Write the file; returns what reading must give, by Hugging Face name."""
    names = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
    hf = CONFIG | {"model_type": architecture, "architectures": [names[architecture]]}
    specs = checkpoint_tensors(plan(read_config(hf | {"vocab_size": len(WORDS)}), PRESETS["fp16"]))
    writer = GGUFWriter(path, architecture)
    for key, value in (BASE | (change or {})).items():
        if value is None:
            continue
        full = key if key.startswith(("tokenizer.", "split.")) else f"{architecture}.{key}"
        kinds = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        kinds[type(value)](full, value)
    add_tokenizer(writer, pre, tokenizer or {})
    expected = {}
    biases = BIASES if architecture == "qwen2" else []
    stored = [n for n in GLOBAL if not (tied and n == "output.weight")]
    stored += [f"blk.{layer}.{name}" for layer in range(2) for name in BLOCK + biases]
    for name in stored:
        if name == drop:
            continue
        tensor = random_tensor(hf_name(name, NAMES), specs[hf_name(name, NAMES)])
        kind = quantization if tensor.dim() == 2 else GGMLQuantizationType.F32
        heads = {"attn_q.weight": 4, "attn_k.weight": 2}.get(name.partition("blk.")[2][2:])
        written = interleave(tensor, heads) if heads and architecture == "llama" else tensor
        data = quantize(written.numpy(), kind)
        writer.add_tensor(name, data, raw_dtype=kind)
        # Blocks lie along a row, so quantizing rows in another order gives the same numbers.
        values = dequantize(quantize(tensor.numpy(), kind), kind)
        expected[hf_name(name, NAMES)] = torch.from_numpy(np.array(values, dtype=np.float32))
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def add_tokenizer(writer: GGUFWriter, pre: str | None, change: dict) -> None:
    """A byte-level BPE vocabulary whose merges would join digits; `change` replaces entries.

    Keys are those of the format without `tokenizer.`, None removes one.
    """
    entries = {
        "ggml.model": "gpt2",
        "ggml.pre": pre,
        "ggml.tokens": WORDS,
        "ggml.token_type": [3, 3] + [1] * (len(WORDS) - 2),
        "ggml.merges": MERGES,
        "ggml.bos_token_id": 0,
        "ggml.eos_token_id": 1,
        "chat_template": "{% for m in messages %}<s>{{ m['content'] }}{% endfor %}",
    }
    kinds = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in (entries | change).items():
        if value is not None:
            kinds[type(value)](f"tokenizer.{key}", value)
