"""Models that read images, too: their language part is quantized, and says that it is a part."""

import json

import pytest
import torch
import transformers

from quatom.checkpoint.language_part import language_part
from quatom.checkpoint.reader import open_source, read_model_config
from quatom.errors import ModelError
from quatom.families.registry import read_config
from quatom.loading import load
from quatom.modeling.context import full_sequences_context
from quatom.quantize.pipeline import quantize_checkpoint
from tests.conftest import write_byte_tokenizer

TEXT = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "pad_token_id": None,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
# model: (kind of its language part, keys of its own, kind of its vision part)
MODELS = {
    "Gemma3": ("gemma3_text", {"mm_tokens_per_image": 4}, "siglip_vision_model"),
    "Mistral3": ("mistral", {}, "pixtral"),
    "Llava": ("llama", {"vision_feature_layer": -1}, "clip_vision_model"),
}
LENGTH = 40


def save(name, folder):
    """A tiny model of the class, in the names that transformers saves it under."""
    text, own, vision = MODELS[name]
    config = getattr(transformers, f"{name}Config")(
        text_config={"model_type": text, **TEXT},
        vision_config={"model_type": vision, **VISION},
        eos_token_id=257,
        tie_word_embeddings=name == "Gemma3",
        **own,
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).float().eval()
    model.save_pretrained(folder)
    write_byte_tokenizer(folder)
    return model


@pytest.fixture(scope="module", params=MODELS)
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wrapped") / request.param
    return folder, save(request.param, folder), request.param


@torch.inference_mode()
def test_text_gives_the_logits_of_transformers(saved):
    folder, theirs, _ = saved
    loaded = load(folder)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 256, (LENGTH,), generator=generator)
    want = theirs(input_ids=tokens[None]).logits[0]
    context = full_sequences_context(1, LENGTH, 16, loaded.device)
    got = loaded.model.compute_logits(
        loaded.model(tokens, context, loaded.model.allocate_kv_cache(-(-LENGTH // 16), 16))
    )
    # As in tests/families/test_logits.py: float32 sums in another order.
    assert (got - want).abs().max() < 1e-3


def test_its_configuration_is_that_of_the_language_model(saved):
    folder, _, name = saved
    opened = open_source(folder)
    assert opened.model_config == read_model_config(folder)[0]
    assert (
        opened.config_dict["architectures"]
        != json.loads((folder / "config.json").read_text())["architectures"]
    )
    assert "text_config" not in opened.config_dict
    assert opened.model_config.eos_token_ids == (257,)
    assert any(f"{name}ForConditionalGeneration: its language part" in n for n in opened.notes)
    assert any("passed over: no result depends on it" in note for note in opened.notes)


def test_a_quantized_language_part_is_a_language_model(saved, tmp_path, caplog):
    folder, _, name = saved
    caplog.set_level("INFO", "quatom")
    quantize_checkpoint(folder, tmp_path / "q", "w8a8", calibration=None)
    assert f"{name}ForConditionalGeneration: its language part alone is read" in caplog.text
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    assert config["architectures"][0].endswith("ForCausalLM")
    assert load(tmp_path / "q").recipe.name == "w8a8"


def test_keys_that_a_file_leaves_out_are_those_of_transformers(tmp_path):
    """The released Gemma 3 files name neither heads nor vocabulary."""
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "eos_token_id": [1, 106],
        "text_config": {
            "model_type": "gemma3_text",
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 34,
            "sliding_window": 1024,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        },
    }
    text, _ = language_part(tmp_path, config)
    read = read_config(text)
    assert (read.vocab_size, read.num_layers, read.eos_token_ids) == (262_208, 34, (1, 106))
    assert read.layers[0].attention.num_heads == 8
    assert [layer.attention.window for layer in read.layers[:6]] == [1024] * 5 + [None]


def test_other_models_with_images_are_refused_by_name(tmp_path):
    pali = {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "text_config": {"model_type": "gemma"},
    }
    with pytest.raises(ModelError, match=r"PaliGemma.*save its text model alone"):
        read_config(language_part(tmp_path, pali)[0])
    llava = {
        "architectures": ["LlavaForConditionalGeneration"],
        "text_config": {"model_type": "falcon"},
    }
    with pytest.raises(ModelError, match=r"language part of Llava.*'falcon', which is not"):
        language_part(tmp_path, llava)
    broken = {
        "architectures": ["LlavaForConditionalGeneration"],
        "text_config": {"model_type": "llama", "hidden_size": "wide"},
    }
    with pytest.raises(ModelError, match=r"text_config is not valid|hidden_size must be"):
        read_config(language_part(tmp_path, broken)[0])
