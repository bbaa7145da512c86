"""Popular models that Quatom does not run, and what they have that its decoder cannot compute."""

from collections.abc import Mapping
from typing import Any

from quatom.errors import ModelError

_MLA = "attention over compressed keys and values (MLA)"
_LINEAR = "layers of linear attention, whose state is no KV cache"
_STATE_SPACE = "state-space layers (Mamba), whose state is no KV cache"
_ALIBI = "attention biases by distance (ALiBi) in place of rotary embedding"
_ENCODER = "an encoder beside the decoder"
_BY_REASON: Mapping[str, str] = {
    _MLA: """
        DeepseekV2ForCausalLM deepseek_v2 DeepseekV3ForCausalLM deepseek_v3 DeepseekV32ForCausalLM
        deepseek_v32 kimi_k2 KimiK25ForConditionalGeneration Kimi_K25ForConditionalGeneration
        kimi_k25 Glm4MoeLiteForCausalLM glm4_moe_lite GlmMoeDsaForCausalLM glm_moe_dsa
        LongcatFlashForCausalLM longcat_flash MiniCPM3ForCausalLM minicpm3 Mistral4ForCausalLM
        mistral4 YoutuForCausalLM youtu
    """,
    _LINEAR: """
        Qwen3NextForCausalLM qwen3_next Qwen3_5ForCausalLM Qwen3_5ForConditionalGeneration qwen3_5
        qwen3_5_text Qwen3_5MoeForCausalLM Qwen3_5MoeForConditionalGeneration qwen3_5_moe
        qwen3_5_moe_text KimiLinearForCausalLM kimi_linear MiniMaxForCausalLM minimax
        MiniMaxText01ForCausalLM MiniMaxM1ForCausalLM OlmoHybridForCausalLM olmo_hybrid
        RwkvForCausalLM rwkv
    """,
    _STATE_SPACE: """
        MambaForCausalLM mamba Mamba2ForCausalLM mamba2 FalconMambaForCausalLM falcon_mamba
        FalconH1ForCausalLM falcon_h1 JambaForCausalLM jamba BambaForCausalLM bamba
        ZambaForCausalLM zamba Zamba2ForCausalLM zamba2 NemotronHForCausalLM nemotron_h
    """,
    "layers of short convolutions": "Lfm2ForCausalLM lfm2 Lfm2MoeForCausalLM lfm2_moe",
    "recurrent layers": "RecurrentGemmaForCausalLM recurrent_gemma xLSTMForCausalLM xlstm",
    _ALIBI: "BloomForCausalLM bloom MptForCausalLM MPTForCausalLM mpt",
    _ENCODER: """
        T5ForConditionalGeneration t5 MT5ForConditionalGeneration mt5
        T5GemmaForConditionalGeneration t5gemma BartForConditionalGeneration bart
        WhisperForConditionalGeneration whisper
    """,
    "attention within chunks, and norms of q and k after rotary embedding": """
        Llama4ForCausalLM Llama4ForConditionalGeneration llama4 llama4_text
    """,
    "norms of q and k after rotary embedding": """
        HunYuanDenseV1ForCausalLM hunyuan_v1_dense HunYuanMoEV1ForCausalLM hunyuan_v1_moe
    """,
    "a gate on what attention gives": "AfmoeForCausalLM afmoe LagunaForCausalLM laguna",
    "heads of v of another size than those of k": "MiMoV2FlashForCausalLM mimo_v2_flash",
    "queries, keys and values that are clamped": "DbrxForCausalLM dbrx",
    "experts in attention": "JetMoeForCausalLM jetmoe",
    "experts beside attention": "Cohere2MoeForCausalLM cohere2_moe",
    "several residual streams and an embedding for each layer": """
        Gemma3nForCausalLM Gemma3nForConditionalGeneration gemma3n gemma3n_text
    """,
    "norms of v and a factor of each layer's output": """
        Gemma4ForCausalLM Gemma4ForConditionalGeneration gemma4 gemma4_text
    """,
    "layers that attend to images": """
        MllamaForCausalLM MllamaForConditionalGeneration mllama mllama_text_model
    """,
    "an activation with learned constants (xIELU)": "ApertusForCausalLM apertus",
    "norms inside attention and the feed-forward layer": "BitNetForCausalLM bitnet",
    "norms without weights": "OlmoForCausalLM olmo",
    "differences of two attentions": "DiffLlamaForCausalLM diffllama",
    "q, k and v in one tensor, in turns; convert it to the form of Llama": """
        InternLM2ForCausalLM internlm2
    """,
}
REFUSED: Mapping[str, str] = {
    name: reason for reason, names in _BY_REASON.items() for name in names.split()
}
"""Architecture or model_type -> what the model has that Quatom does not compute."""


def check_not_refused(config: Mapping[str, Any]) -> None:
    """Say of a known model why it is not supported, be it the language part of a larger one.

    Raises:
        ModelError: it is one of `REFUSED`.
    """
    text = config.get("text_config")
    parts = (config, text) if isinstance(text, Mapping) else (config,)
    for part in parts:
        architectures = part.get("architectures")
        names = architectures if isinstance(architectures, list) else [architectures]
        for name in (*names, part.get("model_type")):
            if isinstance(name, str) and name in REFUSED:
                raise ModelError(
                    f"{name} is not supported: it has {REFUSED[name]}; the model families that "
                    "Quatom runs are in docs/reference/families.md"
                )
