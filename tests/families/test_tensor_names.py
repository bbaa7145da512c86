"""The tensors that a family expects in a file are those that transformers writes."""

import pytest
import torch
import transformers
from safetensors.torch import load_file

from quatom.families.registry import FAMILIES, read_config
from tests.families.models import TINY, UNKNOWN, tiny_config, tiny_model


def norm_tensors(prefix, norm, size):
    if not norm.implicit:
        yield f"{prefix}.weight", (size,)
    if norm.bias:
        yield f"{prefix}.bias", (size,)


def expected_tensors(config):
    """Name and shape of every tensor of the floating-point model."""
    yield config.embedding_name, (config.vocab_size, config.hidden_size)
    if config.positions is not None:
        yield config.positions.name, (config.positions.rows, config.hidden_size)
    for index, layer in enumerate(config.layers):
        prefix = f"{config.layer_prefix}{index}."
        for site, linears in layer.linears.items():
            columns = config.input_channels(layer, site)
            for linear in linears:
                if linear.experts is not None:
                    # As transformers 5 holds them: all experts in one tensor.
                    held = next(s for s in linear.spellings if s.names[0].endswith("_proj"))
                    shape = (columns, linear.rows) if held.transposed else (linear.rows, columns)
                    yield prefix + held.names[0], (linear.experts, *shape)
                    if linear.bias:
                        (bias,) = linear.bias_spellings
                        yield prefix + bias.names[0], (linear.experts, linear.rows)
                    continue
                name, shape = linear.name, (linear.rows, columns)
                # GPT-2's files hold transposed weights; Hunyuan's have other names.
                for spelling in (s for s in linear.spellings if s.transposed):
                    name, shape = spelling.names[0].removesuffix(".weight"), (columns, linear.rows)
                yield f"{prefix}{name}.weight", shape
                if linear.bias:
                    yield f"{prefix}{name}.bias", (linear.rows,)
        for place, norm in layer.norms.items():
            yield from norm_tensors(prefix + layer.norm_names[place], norm, config.hidden_size)
        if layer.experts is not None:
            for kind, names in layer.experts.tensors.items():
                shape = layer.experts.shape(kind, config.hidden_size)
                own = next(name for name in names if "moe.gate" not in name)
                if config.family.startswith("granitemoe"):
                    own = names[-1]
                if config.family == "ernie4_5_moe" and kind == "correction":
                    own, shape = names[1], (1, *shape)
                yield prefix + own, shape
        attention = layer.attention
        if attention.sinks:
            yield prefix + layer.sinks_name, (attention.num_heads,)
        if attention.qk_norm is not None:
            heads, channels = (attention.num_heads, attention.num_kv_heads), attention.head_dim
            for at, (name, count) in enumerate(zip(layer.qk_norm_names, heads, strict=True)):
                shape = {"head": (channels,), "each": (count, channels), "all": (count * channels,)}
                if layer.qk_norm_parts is None:
                    yield f"{prefix}{name}.weight", shape[attention.qk_norm_axis]
                    continue
                for head in range(count):  # StableLM's files hold them one by one
                    yield f"{prefix}{layer.qk_norm_parts[at].format(head)}.weight", (channels,)
    yield from norm_tensors(config.final_norm_name, config.final_norm, config.hidden_size)
    if not config.tie_word_embeddings:
        yield config.head_name, (config.vocab_size, config.hidden_size)
    if config.head_bias:
        yield config.head_bias_name, (config.vocab_size,)


@pytest.mark.parametrize("name", TINY)
def test_names_and_shapes_are_those_of_transformers(name, tmp_path):
    model = tiny_model(name)
    config = read_config(model.config.to_dict())
    tensors = model.state_dict()
    if name == "exaone":  # it runs in Llama's class, and is saved under names of its own
        model.save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors") | {"lm_head.weight": torch.empty(0)}
    stored = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    if config.tie_word_embeddings:
        del stored[config.head_name]
    assert dict(expected_tensors(config)) == stored


def test_every_family_has_a_tiny_model():
    if UNKNOWN:
        pytest.skip(f"transformers {transformers.__version__} has no {', '.join(UNKNOWN)}")
    assert {read_config(tiny_config(name).to_dict()).family for name in TINY} == {
        family.name for family in FAMILIES
    }
