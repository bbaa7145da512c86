"""Popular models that Quatom does not run, and what they have that its decoder cannot compute."""

import re
from collections.abc import Container, Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from quatom.errors import ModelError

_MLA = "attention over compressed keys and values (MLA)"
_LINEAR = "layers of linear attention, whose state is no KV cache"
_STATE_SPACE = "state-space layers (Mamba), whose state is no KV cache"
_ALIBI = "attention biases by distance (ALiBi) in place of rotary embedding"
_ENCODER = "an encoder beside the decoder"
_OWN_CODE = "code of its own that transformers lacks, so that nothing can be compared with it"
_BY_REASON: Mapping[str, str] = {
    _MLA: """
        DeepseekV2ForCausalLM deepseek_v2 DeepseekV3ForCausalLM deepseek_v3 DeepseekV32ForCausalLM
        deepseek_v32 kimi_k2 KimiK25ForConditionalGeneration Kimi_K25ForConditionalGeneration
        kimi_k25 KimiVLForConditionalGeneration kimi_vl Glm4MoeLiteForCausalLM glm4_moe_lite
        GlmMoeDsaForCausalLM glm_moe_dsa LongcatFlashForCausalLM longcat_flash MiniCPM3ForCausalLM
        minicpm3 Mistral4ForCausalLM mistral4 YoutuForCausalLM youtu SarvamMLAForCausalLM
        sarvam_mla AXK1ForCausalLM axk1
    """,
    _LINEAR: """
        Qwen3NextForCausalLM qwen3_next Qwen3_5ForCausalLM Qwen3_5ForConditionalGeneration qwen3_5
        qwen3_5_text Qwen3_5MoeForCausalLM Qwen3_5MoeForConditionalGeneration qwen3_5_moe
        qwen3_5_moe_text KimiLinearForCausalLM kimi_linear MiniMaxForCausalLM minimax
        MiniMaxText01ForCausalLM MiniMaxM1ForCausalLM OlmoHybridForCausalLM olmo_hybrid
        RwkvForCausalLM rwkv RWKV7ForCausalLM rwkv7 BailingMoeLinearForCausalLM
        BailingMoeLinearV2ForCausalLM bailing_moe_linear BailingMoeV2_5ForCausalLM
        BailingHybridForCausalLM bailing_hybrid
    """,
    _STATE_SPACE: """
        MambaForCausalLM mamba Mamba2ForCausalLM mamba2 FalconMambaForCausalLM falcon_mamba
        FalconH1ForCausalLM falcon_h1 JambaForCausalLM jamba BambaForCausalLM bamba
        ZambaForCausalLM zamba Zamba2ForCausalLM zamba2 NemotronHForCausalLM nemotron_h
        Plamo2ForCausalLM plamo2 Phi4FlashForCausalLM phi4flash
    """,
    "layers of short convolutions": """
        Lfm2ForCausalLM lfm2 Lfm2MoeForCausalLM lfm2_moe Lfm2VlForConditionalGeneration lfm2_vl
    """,
    "convolutions of queries and keys": "ZayaForCausalLM zaya",
    "recurrent layers": "RecurrentGemmaForCausalLM recurrent_gemma xLSTMForCausalLM xlstm",
    _ALIBI: """
        BloomForCausalLM bloom MptForCausalLM MPTForCausalLM mpt JAISLMHeadModel jais
    """,
    "positions by sines and cosines that are added to embeddings": """
        XGLMForCausalLM xglm CTRLLMHeadModel ctrl
    """,
    _ENCODER: """
        T5ForConditionalGeneration t5 MT5ForConditionalGeneration mt5
        T5GemmaForConditionalGeneration t5gemma BartForConditionalGeneration bart
        WhisperForConditionalGeneration whisper Florence2ForConditionalGeneration florence2
    """,
    "attention within chunks, and norms of q and k after rotary embedding": """
        Llama4ForCausalLM Llama4ForConditionalGeneration llama4 llama4_text
    """,
    "norms of q and k after rotary embedding": """
        HunYuanDenseV1ForCausalLM hunyuan_v1_dense HunYuanMoEV1ForCausalLM hunyuan_v1_moe
        NanoChatForCausalLM nanochat
    """,
    "norms of q and k after rotary embedding, and keys and values that layers share": """
        HunYuanForCausalLM hunyuan
    """,
    "norms of q and k with biases": """
        PersimmonForCausalLM persimmon FuyuForCausalLM fuyu ChameleonForConditionalGeneration
        chameleon
    """,
    "attention to tokens on both sides": """
        BertModel BertForMaskedLM bert RobertaModel RobertaForMaskedLM roberta XLMRobertaModel
        XLMRobertaForMaskedLM xlm-roberta ModernBertModel ModernBertForMaskedLM modernbert
    """,
    "a gate on what attention gives": """
        AfmoeForCausalLM afmoe LagunaForCausalLM laguna Step3p5ForCausalLM step3p5
        Step3p7ForConditionalGeneration step3p7
    """,
    "attention whose queries are made in two steps, by a key and a value that all heads share": """
        Step3VLForConditionalGeneration step3_vl Step3TextForCausalLM step3_text
    """,
    "heads of v of another size than those of k": "MiMoV2FlashForCausalLM mimo_v2_flash",
    "queries, keys and values that are clamped": "DbrxForCausalLM DBRXForCausalLM dbrx",
    "experts in attention": "JetMoeForCausalLM jetmoe",
    "experts beside attention": "Cohere2MoeForCausalLM cohere2_moe",
    "experts that read another input than the feed-forward layer beside them": """
        ArcticForCausalLM arctic
    """,
    "a mask of attention that is learned": "DogeForCausalLM doge",
    "attention to blocks of tokens alone": "Phi3SmallForCausalLM phi3small",
    "adapters (LoRA) beside its weights, for images and sound": """
        Phi4MMForCausalLM phi4mm Phi4MultimodalForCausalLM phi4_multimodal
    """,
    "layers of different sizes": """
        DeciLMForCausalLM DeciCoderForCausalLM deci nemotron-nas OpenELMForCausalLM openelm
    """,
    "several residual streams and an embedding for each layer": """
        Gemma3nForCausalLM Gemma3nForConditionalGeneration gemma3n gemma3n_text
    """,
    "several residual streams": "DeepseekV4ForCausalLM deepseek_v4 HYV4ForCausalLM hy_v4",
    "norms of v and a factor of each layer's output": """
        Gemma4ForCausalLM Gemma4ForConditionalGeneration gemma4 gemma4_text
    """,
    "layers that attend to images": """
        MllamaForCausalLM MllamaForConditionalGeneration mllama mllama_text_model
    """,
    "a part that makes speech from what the language part gives": """
        Qwen2_5OmniModel Qwen2_5OmniForConditionalGeneration qwen2_5_omni
        Qwen3OmniMoeForConditionalGeneration qwen3_omni_moe
    """,
    "an activation with learned constants (xIELU)": "ApertusForCausalLM apertus",
    "norms inside attention and the feed-forward layer": """
        BitNetForCausalLM BitnetForCausalLM bitnet
    """,
    "norms of what a layer adds to its input (post-norm)": "OpenAIGPTLMHeadModel openai-gpt",
    "differences of two attentions": "DiffLlamaForCausalLM diffllama",
    "q, k and v in one tensor, in turns; convert it to the form of Llama": """
        InternLM2ForCausalLM internlm2
    """,
    "q, k and v in one tensor, cut into four parts": "CodeGenForCausalLM codegen",
    "q, k and v in one tensor, biases by distance (13B) and a head of unit rows (Baichuan 2)": """
        BaichuanForCausalLM BaiChuanForCausalLM baichuan
    """,
    _OWN_CODE: """
        QWenLMHeadModel qwen MiniCPMForCausalLM minicpm MiniCPMV minicpmv MiniCPMO minicpmo
        InternLMForCausalLM internlm XverseForCausalLM xverse AquilaForCausalLM AquilaModel aquila
        OrionForCausalLM orion DeepseekForCausalLM deepseek BailingMoeForCausalLM
        BailingMoeV2ForCausalLM bailing_moe TeleChatForCausalLM TeleChat2ForCausalLM telechat
        SkyworkForCausalLM skywork SolarForCausalLM solar MiMoForCausalLM mimo Grok1ForCausalLM
        Grok1ModelForCausalLM grok-1 PlamoForCausalLM plamo Phi3VForCausalLM phi3_v
        MolmoForCausalLM molmo OvisForCausalLM ovis LLaDAModelLM llada DreamModel Dream
        DeepseekVLV2ForCausalLM DeepseekOCRForCausalLM deepseek_vl_v2 DotsOCRForCausalLM dots_ocr
        CogVLMForCausalLM cogvlm MotifForCausalLM motif Step1ForCausalLM step1 HCXVisionForCausalLM
        hyperclovax_vlm
    """,
    "the form of ChatGLM's own code; take a release with GlmForCausalLM (glm-4-9b-chat-hf)": """
        ChatGLMModel ChatGLMForConditionalGeneration chatglm
    """,
    "the form of InternVL's own code; take the release whose name ends in -hf": """
        InternVLChatModel internvl_chat
    """,
    "the form of LLaVA's own code; take the release whose name ends in -hf": """
        LlavaLlamaForCausalLM LlavaMistralForCausalLM LlavaQwenForCausalLM
        LlavaQwen2ForCausalLM llava_llama llava_mistral llava_qwen llava_qwen2
    """,
    "the form of OLMo's own code; take the release whose name ends in -hf": """
        OLMoForCausalLM hf_olmo
    """,
    "the form of Falcon's first release; take the later one, with FalconForCausalLM": """
        RWForCausalLM RefinedWeb RefinedWebModel
    """,
    "the form of Phi's first release; take the later one, with PhiForCausalLM": """
        MixFormerSequentialForCausalLM mixformer-sequential
    """,
    "the form of StableLM's first release; take the later one, with StableLmForCausalLM": """
        StableLMEpochForCausalLM stablelm_epoch
    """,
    "the form of Yi's first release; take the later one, with LlamaForCausalLM": """
        YiForCausalLM Yi
    """,
    "the form of SantaCoder's own code; take the release with GPTBigCodeForCausalLM": """
        GPT2LMHeadCustomModel
    """,
}
WHERE = "the model families that Quatom runs are in docs/reference/families.md"
_TASK = re.compile(r"(For[A-Z]\w*|LMHeadModel|Model)$")
REFUSED: Mapping[str, str] = {
    name: reason for reason, names in _BY_REASON.items() for name in names.split()
}
"""Architecture or model_type -> what the model has that Quatom does not compute."""


def check_not_refused(config: Mapping[str, Any], supported: Container[str] = ()) -> None:
    """Say of a known model why it is not supported, be it the language part of a larger one.

    A supported architecture decides against model_type: that of code outside transformers is often
    the one of an earlier generation, as in the first files of MiniMax-M2.

    Args:
        config: of config.json.
        supported: Architectures.

    Raises:
        ModelError: it is one of `REFUSED`.
    """
    text = config.get("text_config")
    parts = (config, text) if isinstance(text, Mapping) else (config,)
    for part in parts:
        architectures = part.get("architectures")
        names = architectures if isinstance(architectures, list | tuple) else [architectures]
        names = [name for name in names if isinstance(name, str)]
        if not any(name in supported for name in names):
            names.append(part.get("model_type"))
        for name in names:
            if isinstance(name, str) and name in REFUSED:
                raise ModelError(f"{name} is not supported: it has {REFUSED[name]}; {WHERE}")


def nearest(name: str, supported: Iterable[str]) -> str:
    """What an error adds of the supported names that an unknown one may mean, and of where all are.

    Architectures are compared without the task at their end: LlamaModel is near LlamaForCausalLM.
    """
    stems: dict[str, str] = {}
    for known in supported:
        stems.setdefault(_stem(known), known)
    stem = _stem(name)
    near = [stem] if stem in stems else get_close_matches(stem, stems, n=3, cutoff=0.75)
    if near:
        return f"nearest supported: {', '.join(stems[one] for one in near)}; {WHERE}"
    some = list(stems.values())[:3]
    return f"supported: {', '.join(some)} and {len(stems) - len(some)} more; {WHERE}"


def _stem(name: str) -> str:
    return _TASK.sub("", name).lower().replace("_", "")
