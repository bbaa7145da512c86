"""Popular models that do not run are refused by one line that says what they have."""

import pytest
import transformers
from packaging.version import Version
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from quatom.checkpoint.language_part import language_part
from quatom.errors import ModelError
from quatom.families.refused import REFUSED, WHERE
from quatom.families.registry import FAMILIES, find_family, read_config

# Code that is not in transformers.
_REMOTE = """
    kimi_k2 KimiK25ForConditionalGeneration KimiVLForConditionalGeneration kimi_vl internlm2
    InternLM2ForCausalLM MiniMaxText01ForCausalLM MiniMaxM1ForCausalLM MPTForCausalLM
    SarvamMLAForCausalLM RWKV7ForCausalLM rwkv7 BailingMoeLinearForCausalLM bailing_moe_linear
    BailingMoeLinearV2ForCausalLM BailingMoeV2_5ForCausalLM Plamo2ForCausalLM plamo2
    Phi4FlashForCausalLM phi4flash JAISLMHeadModel jais HunYuanForCausalLM hunyuan
    Step3p5ForCausalLM Step3VLForConditionalGeneration step3_vl Step3TextForCausalLM step3_text
    DBRXForCausalLM ArcticForCausalLM arctic Phi3SmallForCausalLM phi3small Phi4MMForCausalLM
    phi4mm DeciLMForCausalLM DeciCoderForCausalLM deci nemotron-nas OpenELMForCausalLM openelm
    Qwen2_5OmniModel BitnetForCausalLM BaichuanForCausalLM BaiChuanForCausalLM baichuan
    QWenLMHeadModel qwen MiniCPMForCausalLM minicpm MiniCPMV minicpmv MiniCPMO minicpmo
    InternLMForCausalLM internlm XverseForCausalLM xverse AquilaForCausalLM AquilaModel aquila
    OrionForCausalLM orion DeepseekForCausalLM deepseek BailingMoeForCausalLM
    BailingMoeV2ForCausalLM bailing_moe TeleChatForCausalLM TeleChat2ForCausalLM telechat
    SkyworkForCausalLM skywork SolarForCausalLM solar MiMoForCausalLM mimo Grok1ForCausalLM
    Grok1ModelForCausalLM grok-1 PlamoForCausalLM plamo Phi3VForCausalLM phi3_v MolmoForCausalLM
    molmo OvisForCausalLM ovis LLaDAModelLM llada DreamModel Dream ChatGLMModel
    ChatGLMForConditionalGeneration chatglm InternVLChatModel internvl_chat LlavaLlamaForCausalLM
    LlavaMistralForCausalLM LlavaQwenForCausalLM llava_llama llava_mistral llava_qwen
    OLMoForCausalLM hf_olmo RWForCausalLM RefinedWeb RefinedWebModel
    MixFormerSequentialForCausalLM mixformer-sequential StableLMEpochForCausalLM stablelm_epoch
    YiForCausalLM Yi GPT2LMHeadCustomModel DeepseekVLV2ForCausalLM DeepseekOCRForCausalLM
    deepseek_vl_v2 DotsOCRForCausalLM dots_ocr CogVLMForCausalLM cogvlm MotifForCausalLM motif
    Step1ForCausalLM step1 HCXVisionForCausalLM hyperclovax_vlm LlavaQwen2ForCausalLM llava_qwen2
"""
REMOTE = set(_REMOTE.split())


def test_names_are_those_of_transformers_and_of_no_family():
    types = {name for name in REFUSED if name in CONFIG_MAPPING_NAMES}
    known = set(dir(transformers))  # looking one up would import its module
    classes = {name for name in REFUSED if name in known}
    unknown = REFUSED.keys() - types - classes
    assert unknown >= REMOTE
    if Version(transformers.__version__) >= Version("5.24"):  # which has all the others
        assert unknown == REMOTE
    ours = {name for f in FAMILIES for name in (f.model_type, *f.architectures)}
    assert not ours & REFUSED.keys()


@pytest.mark.parametrize("name", REFUSED)
def test_the_reason_is_one_line(name):
    for config in (
        {"architectures": [name]},
        {"architectures": name, "model_type": None},
        {"model_type": name, "hidden_size": "whatever"},
        {"architectures": [name, "LlamaForCausalLM"], "model_type": "llama"},
        {"architectures": ["SomeModel"], "text_config": {"model_type": name}},
    ):
        with pytest.raises(ModelError) as caught:
            read_config(config)
        message = str(caught.value)
        assert message.startswith(f"{name} is not supported: it has {REFUSED[name]}; ")
        assert "\n" not in message


def test_the_language_part_of_a_larger_model_has_a_reason_too(tmp_path):
    config = {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "text_config": {"model_type": "mistral4"},
    }
    with pytest.raises(ModelError, match=r"mistral4 is not supported: it has .*\(MLA\)"):
        language_part(tmp_path, config)


@pytest.mark.parametrize("kind", ["minimax", "qwen", "deepseek_v3", "bloom", "RefinedWeb"])
def test_a_supported_architecture_decides_against_the_model_type(kind):
    """The first files of MiniMax-M2 have the model_type of MiniMax-Text-01."""
    for family in FAMILIES:
        for name in family.architectures:
            assert find_family({"architectures": [name], "model_type": kind}) is family
    with pytest.raises(ModelError, match=rf"^{kind} is not supported: it has "):
        find_family({"architectures": [], "model_type": kind})


SOME = "supported: LlamaForCausalLM, MistralForCausalLM, MinistralForCausalLM"


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("LlamaModel", "nearest supported: LlamaForCausalLM"),
        ("Qwen2ForRewardModel", "nearest supported: Qwen2ForCausalLM"),
        ("Gemma3TextModel", "nearest supported: Gemma3ForCausalLM"),
        ("StableLMForCausalLM", "nearest supported: StableLmForCausalLM"),
        ("Qwen3VLForX", "nearest supported: Qwen3ForCausalLM"),
        ("BigBirdForMaskedLM", f"{SOME} and {len(FAMILIES) - 3} more"),
    ],
)
def test_an_unknown_architecture_is_one_short_line(name, near):
    with pytest.raises(ModelError) as caught:
        find_family({"architectures": [name]})
    assert str(caught.value) == f"architecture {name} is not supported; {near}; {WHERE}"


@pytest.mark.parametrize(
    ("kind", "near"),
    [
        ("LLaMA", "nearest supported: llama"),
        ("qwen_2", "nearest supported: qwen2"),
        ("other", f"supported: llama, mistral, ministral and {len(FAMILIES) - 3} more"),
    ],
)
def test_an_unknown_model_type_is_one_short_line(kind, near):
    with pytest.raises(ModelError) as caught:
        find_family({"model_type": kind})
    assert str(caught.value) == f"model_type {kind!r} is not supported; {near}; {WHERE}"
    with pytest.raises(ModelError, match=rf"{kind}' is not supported; PhiForCausalLM has 'phi'$"):
        find_family({"model_type": kind, "architectures": ["PhiForCausalLM"]})
