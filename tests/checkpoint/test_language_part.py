"""Models that read images, too: their language part is quantized, and says that it is a part."""

import json
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from quatom.checkpoint.language_part import WRAPPERS, language_part
from quatom.checkpoint.reader import open_source, read_model_config
from quatom.errors import CheckpointError, ModelError
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
    "eos_token_id": 257,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
SIGLIP = {"vision_config": {"model_type": "siglip_vision_model", **VISION}}
CLIP = {"vision_config": {"model_type": "clip_vision_model", **VISION}}
PIXTRAL = {"vision_config": {"model_type": "pixtral", **VISION}}
OF_QWEN = {
    "vision_config": {
        "depth": 1,
        "hidden_size": 32,
        "embed_dim": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": 64,
        "mlp_ratio": 1,
        "fullatt_block_indexes": [0],
        "deepstack_visual_indexes": [0],
    }
}
AUDIO = {
    "audio_config": {
        "d_model": 32,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
}
SAM = {
    "vision_config": {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "mlp_dim": 32,
        "output_channels": 32,
    }
}
INTERNVL = {"vision_config": {**VISION, "image_size": [28, 28], "patch_size": [14, 14]}}


def of_images(section, **rope):
    """Rotary parameters of a model whose image tokens have three positions."""
    return {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "mrope_section": section,
            **rope,
        }
    }


WIDE = {"hidden_size": 128, **of_images([16, 8, 8])}
GLM_MOE = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    **of_images([4, 6, 6], partial_rotary_factor=0.5),
}
GLM = {"hidden_size": 128, "head_dim": None}
GLM_VISION = {
    "vision_config": {"model_type": "glm4v_vision", "image_size": 28, **OF_QWEN["vision_config"]}
}
EXAONE = {"vision_config": {**OF_QWEN["vision_config"], "num_key_value_heads": 2}}
OVIS = {
    "vision_config": {"vocab_size": 32, **VISION},
    "hidden_size": TEXT["hidden_size"],
    "vocab_size": TEXT["vocab_size"],
    "image_token_id": 9,
    "visual_indicator_token_ids": [1, 2, 3, 4, 5],
}
JANUS = {
    "vision_config": {**VISION, "projection_dim": 32},
    "vq_config": {
        "base_channels": 32,
        "channel_multiplier": [1, 1],
        "image_token_embed_dim": 32,
        "latent_channels": 8,
        "num_embeddings": 16,
        "num_patches": 4,
        "num_res_blocks": 1,
        "projection_dim": 32,
    },
}
GROWING = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 16.0,
        "original_max_position_embeddings": 16,
        "llama_4_scaling_beta": 0.1,
    },
}
QWEN_MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,  # gate and up of an expert are a square matrix
    **of_images([16, 8, 8], mrope_interleaved=True),
}
# model: (kind of its language part, keys of that part, keys of the model)
MODELS = {
    "Gemma3": ("gemma3_text", {}, {"mm_tokens_per_image": 4, **SIGLIP}),
    "Mistral3": ("mistral", {}, PIXTRAL),
    "Mistral3 of December 2025": ("ministral3", GROWING, PIXTRAL),
    "Llava": ("llama", {}, {"vision_feature_layer": -1, **CLIP}),
    "LlavaNext": ("llama", {}, {"vision_feature_layer": -1, **CLIP}),
    "LlavaNextVideo": ("llama", {}, {"vision_feature_layer": -1, **CLIP}),
    "LlavaOnevision": ("qwen2", {}, {"vision_feature_layer": -1, **SIGLIP}),
    "VipLlava": ("llama", {}, {"vision_feature_layers": [-1], **CLIP}),
    "VideoLlava": ("llama", {}, CLIP),
    "InternVL": ("qwen2", {}, INTERNVL),
    "Qwen2VL": ("qwen2_vl_text", WIDE, OF_QWEN),
    "Qwen2_5_VL": ("qwen2_5_vl_text", WIDE, OF_QWEN),
    "Qwen3VL": ("qwen3_vl_text", of_images([16, 8, 8], mrope_interleaved=True), OF_QWEN),
    "Qwen3VLMoe": ("qwen3_vl_moe_text", QWEN_MOE, OF_QWEN),
    "Glm4v": ("glm4v_text", {**GLM, **of_images([8, 12, 12])}, GLM_VISION),
    "Glm46V": (
        "glm4v_text",
        {**GLM, **of_images([4, 6, 6], partial_rotary_factor=0.5)},
        GLM_VISION,
    ),
    "Glm46V with experts": ("glm4v_moe_text", GLM_MOE, GLM_VISION),
    "Glm4vMoe": ("glm4v_moe_text", GLM_MOE, OF_QWEN),
    "Idefics2": ("mistral", {}, {"vision_config": VISION}),
    "Idefics3": ("llama", {}, {"vision_config": VISION}),
    "SmolVLM": ("llama", {}, {"vision_config": VISION}),
    "LightOnOcr": ("qwen3", {}, PIXTRAL),
    "GotOcr2": ("qwen2", {}, SAM),
    "DeepseekVL": ("llama", {}, SIGLIP),
    "DeepseekVLHybrid": ("llama", {}, {**SIGLIP, "high_res_vision_config": SAM["vision_config"]}),
    "VideoLlama3": ("qwen2", {}, {"vision_config": VISION}),
    "Ovis2": ("qwen2", {}, OVIS),
    "Janus": ("llama", {}, JANUS),
    "Exaone4_5_": ("exaone4", {}, EXAONE),
    "AudioFlamingo3": ("qwen2", {}, AUDIO),
    "Qwen2Audio": ("qwen2", {}, AUDIO),
    "Qwen3ASR": ("qwen3", {}, AUDIO),
    "AyaVision": ("cohere2", {"hidden_size": 128, "logit_scale": 1.0}, SIGLIP),
    "Cohere2Vision": ("cohere2", {"hidden_size": 128, "logit_scale": 1.0}, SIGLIP),
    "Voxtral": ("llama", {}, AUDIO),
    "GlmAsr": ("llama", {}, AUDIO),
}
LENGTH = 40


def class_of(name):
    """What transformers' names begin with."""
    return name.partition(" ")[0]


def save(name, folder):
    """A tiny model of the class, in the names that transformers saves it under."""
    kind, keys, own = deepcopy(MODELS[name])  # some classes write into what they are given
    config = getattr(transformers, f"{class_of(name)}Config")(
        text_config={"model_type": kind, **TEXT, **keys},
        eos_token_id=257,
        tie_word_embeddings=name == "Gemma3",
        **own,
    )
    torch.manual_seed(0)
    model = (
        getattr(transformers, f"{class_of(name)}ForConditionalGeneration")(config).float().eval()
    )
    model.save_pretrained(folder)
    write_byte_tokenizer(folder)
    return model


def test_every_architecture_is_tried():
    assert {f"{class_of(name)}ForConditionalGeneration" for name in MODELS} == set(WRAPPERS)


def test_the_docs_name_every_architecture():
    page = Path(__file__).resolve().parents[2] / "docs" / "reference" / "families.md"
    text = page.read_text(encoding="utf-8")
    prefixes = {name.removesuffix("ForConditionalGeneration") for name in WRAPPERS}
    assert {prefix for prefix in prefixes if f"`{prefix}`" not in text} == set()


@pytest.fixture(scope="module", params=MODELS)
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wrapped") / request.param
    return folder, save(request.param, folder), class_of(request.param)


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
    assert (got - want).abs().max() < 1e-3 * want.std()


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


def test_ministral_3_in_fp8_as_released(tmp_path):
    """One scale per weight and one of its input, named in the file of the larger model."""
    save("Mistral3 of December 2025", tmp_path)
    file = tmp_path / "model.safetensors"
    name = "model.layers.1.mlp.down_proj.weight"
    want = (source := open_source(tmp_path)).load(name, source.shape(name))
    tensors, scale = {}, torch.tensor(2.0**-9)
    for stored, tensor in load_file(file).items():
        if "language_model" not in stored or not stored.endswith("proj.weight"):
            tensors[stored] = tensor.bfloat16()
            continue
        tensors[stored] = (tensor / scale).to(torch.float8_e4m3fn)
        tensors[f"{stored}_scale_inv"] = scale.bfloat16()
        tensors[stored.replace("weight", "activation_scale")] = torch.tensor(0.5).bfloat16()
    save_file(tensors, file)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {
        "activation_scheme": "static",
        "dequantize": False,
        "modules_to_not_convert": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
        "quant_method": "fp8",
        "weight_block_size": None,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = open_source(tmp_path)
    assert source.model_config.layers[0].attention.query_growth.length == 16
    assert any("14 weights are in FP8" in note for note in source.notes)
    assert any("14 scales of activations" in note for note in source.notes)
    got = source.load(name, source.shape(name))
    # e4m3 has 3 bits after the first, and a step of 2**-9 scales at least.
    torch.testing.assert_close(got, want, rtol=2**-4, atol=2.0**-19)
    quantize_checkpoint(tmp_path, tmp_path / "q", "w8a8", calibration=None)
    written = json.loads((tmp_path / "q" / "config.json").read_text())
    assert written["quantization_config"]["quant_method"] == "quatom"
    assert written["architectures"] == ["Ministral3ForCausalLM"]


@pytest.mark.parametrize(
    ("model", "extra", "shape", "says"),
    [
        ("Gemma3", "lm_head.weight", (320, 64), "differs from model.embed_tokens.weight"),
        ("Gemma3", "lm_head.bias", (320,), "holds lm_head.bias"),
        ("Llava", "lm_head.bias", (320,), "holds lm_head.bias"),
        ("Llava", "model.language_model.norm.bias", (64,), "holds model.norm.bias"),
    ],
)
def test_a_tensor_that_changes_the_text_is_not_passed_over(model, extra, shape, says, tmp_path):
    """A head that a tied model stores all the same, biases that no key tells of."""
    save(model, tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {extra: torch.ones(shape)}, file)
    with pytest.raises(CheckpointError, match=says):
        open_source(tmp_path)


def test_what_early_files_say_of_images_is_passed_over(tmp_path):
    """The released SmolVLM, Idefics3 and Pixtral files."""
    images = {
        "is_composition": True,
        "perceiver_config": {"resampler_depth": 6},
        "pixel_shuffle_factor": 3,
        "qk_layer_norms": False,
        "use_resampler": False,
    }
    part = {**TEXT, "model_type": "llama", **images}
    config = {"architectures": ["SmolVLMForConditionalGeneration"], "text_config": part}
    assert read_config(language_part(tmp_path, config)[0]).hidden_size == TEXT["hidden_size"]
    normed = config | {"text_config": part | {"qk_layer_norms": True}}
    with pytest.raises(ModelError, match="qk_layer_norms = True"):
        read_config(language_part(tmp_path, normed)[0])


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
        "text_config": {"model_type": "biogpt"},
    }
    with pytest.raises(ModelError, match=r"language part of Llava.*'biogpt', which is not"):
        language_part(tmp_path, llava)
    unknown = llava | {"text_config": {"model_type": "nothing"}}
    with pytest.raises(ModelError, match=r"model type .* nothing|'nothing'"):
        language_part(tmp_path, unknown)


@pytest.mark.parametrize(
    "text", [{"model_type": "llama", "hidden_size": "wide"}, {"hidden_size": [5]}, 7, ["llama"], ""]
)
def test_a_wrong_text_config_is_one_line(text, tmp_path):
    config = {"architectures": ["LlavaForConditionalGeneration"], "text_config": text}
    with pytest.raises(ModelError, match=r"transformers does not read|must be") as caught:
        read_config(language_part(tmp_path, config)[0])
    assert "\n" not in str(caught.value)


def test_a_text_config_without_model_type_is_of_the_class_that_transformers_takes(tmp_path):
    config = {"architectures": ["LlavaForConditionalGeneration"], "text_config": {**TEXT}}
    text, _ = language_part(tmp_path, config)
    assert (text["model_type"], text["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert read_config(text).hidden_size == TEXT["hidden_size"]


def test_a_constant_of_the_language_part_is_not_changed(tmp_path):
    part = {**TEXT, **QWEN_MOE, "model_type": "qwen3_vl_moe_text"}
    config = {"architectures": ["Qwen3VLMoeForConditionalGeneration"], "text_config": part}
    for said in ({}, {"norm_topk_prob": True}):
        text, _ = language_part(tmp_path, config | {"text_config": part | said})
        assert read_config(text).layers[0].experts.router.normalized
    refused = config | {"text_config": part | {"norm_topk_prob": False}}
    with pytest.raises(ModelError, match=r"Qwen3VLMoe.* norm_topk_prob False is not supported"):
        language_part(tmp_path, refused)
    part = {**TEXT, **GLM, "model_type": "glm4v_text"}
    for key, value in ("head_dim", 32), ("attention_bias", False):
        config = {"architectures": ["Glm4vForConditionalGeneration"]}
        with pytest.raises(ModelError, match=rf"Glm4v.* {key} {value} is not supported"):
            language_part(tmp_path, config | {"text_config": part | {key: value}})


OLD = {
    **TEXT,
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 8, 8]},
    "rope_theta": 1e6,
    "vision_config": {"depth": 1, "hidden_size": 32},
    "image_token_id": 5,
    "vision_token_id": 6,
    "eos_token_id": 7,
    "tie_word_embeddings": True,
}


def test_a_file_without_text_config_has_its_keys_beside_the_others(tmp_path):
    """The released Qwen2.5-VL files."""
    read = read_config(language_part(tmp_path, OLD)[0])
    assert (read.hidden_size, read.num_layers, read.eos_token_ids) == (64, 2, (7,))
    assert read.tie_word_embeddings
    rope = read.layers[0].attention.rope
    assert (rope.theta, rope.scaling) == (1e6, None)


@pytest.mark.parametrize("names", [None, [], "Qwen2_5_VLForConditionalGeneration"])
def test_a_file_without_architectures_is_what_transformers_takes_it_for(names, tmp_path):
    text, notes = language_part(tmp_path, OLD | {"architectures": names})
    assert (text, notes) == language_part(tmp_path, OLD)
    for other in ({"model_type": "llama"}, {"model_type": "nothing"}, {"model_type": [3]}, {}):
        assert language_part(tmp_path, other) == (other, [])


@pytest.mark.parametrize("name", ["Llava", "Mistral3", "Gemma3"])
def test_keys_that_transformers_does_not_read_beside_the_others_are_refused(name, tmp_path):
    config = {"architectures": [f"{name}ForConditionalGeneration"], "hidden_size": 96}
    with pytest.raises(ModelError, match=rf"read hidden_size of {name}.* move the keys"):
        language_part(tmp_path, config)


def test_keys_beside_the_others_are_read_as_the_installed_transformers_reads_them(tmp_path):
    """Its releases differ over GLM-4V."""
    reads = transformers.Glm4vConfig(hidden_size=96).get_text_config().hidden_size == 96
    config = {"architectures": ["Glm4vForConditionalGeneration"], "hidden_size": 96}
    with nullcontext() if reads else pytest.raises(ModelError, match="read hidden_size of Glm4v"):
        assert language_part(tmp_path, config)[0]["hidden_size"] == 96


def test_an_unknown_key_beside_the_others_is_refused_by_name(tmp_path):
    with pytest.raises(ModelError, match=r"logit_squares"):
        read_config(language_part(tmp_path, OLD | {"logit_squares": 2})[0])
