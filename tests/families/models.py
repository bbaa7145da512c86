"""A tiny random model of every family, from transformers' own classes, made in a moment.

Hidden sizes are multiples of 32, head sizes vary, windows are shorter than 40 tokens, and the
vocabulary is that of the byte tokenizer of tests/conftest.py.
"""

from pathlib import Path

import torch
import transformers

from quatom.modeling.context import ForwardContext
from tests.conftest import write_byte_tokenizer

COMMON = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": None,
}
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}


def longrope(dim: int, **more) -> dict:
    """Rotary parameters of a Phi model that turns `dim` channels of a head."""
    steps = range(dim // 2)
    return {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0 + 0.02 * step for step in steps],
        "long_factor": [1.0 + 0.25 * step for step in steps],
        "original_max_position_embeddings": 256,
        **more,
    }


# name: (prefix of transformers' classes, what differs from COMMON)
TINY: dict[str, tuple[str, dict]] = {
    "llama": ("Llama", {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}),
    "llama-biased": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 80}),
    "llama-llama3": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama-linear": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    ),
    "llama-dynamic": (
        "Llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
    ),
    "llama-yarn": ("Llama", {"rope_parameters": YARN}),
    "mistral": ("Mistral", {"head_dim": 96, "sliding_window": 24}),
    "ministral": (
        "Ministral",
        {
            "head_dim": 128,
            "num_hidden_layers": 4,
            "sliding_window": 20,
            "layer_types": ALTERNATING,
        },
    ),
    "ministral3": (
        "Ministral3",
        {
            "head_dim": 64,
            "tie_word_embeddings": True,
            # Texts of tests are longer: queries of their last positions grow.
            "rope_parameters": YARN
            | {
                "original_max_position_embeddings": 16,
                "factor": 32.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.5,
            },
        },
    ),
    "qwen2": ("Qwen2", {"hidden_size": 192, "num_attention_heads": 3, "tie_word_embeddings": True}),
    "qwen2-windows": (
        "Qwen2",
        {
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 16,
            "max_window_layers": 1,
        },
    ),
    "qwen3": ("Qwen3", {"hidden_size": 96, "num_key_value_heads": 2, "head_dim": 128}),
    "qwen3-yarn": (
        "Qwen3",
        {"head_dim": 64, "attention_bias": True, "rope_parameters": YARN | {"rope_theta": 1e6}},
    ),
    "gemma": ("Gemma", {"hidden_size": 96, "head_dim": 192}),
    "gemma2": (
        "Gemma2",
        {
            "hidden_size": 64,
            "num_hidden_layers": 4,
            "head_dim": 256,
            "query_pre_attn_scalar": 144,
            "sliding_window": 32,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "Gemma3Text",
        {
            "hidden_size": 64,
            "num_hidden_layers": 4,
            "head_dim": 256,
            "query_pre_attn_scalar": 200,
            "sliding_window": 24,
            "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            },
        },
    ),
    "vaultgemma": (
        "VaultGemma",
        {
            "hidden_size": 96,
            "num_hidden_layers": 3,
            "head_dim": 128,
            "query_pre_attn_scalar": 100,
            "sliding_window": 26,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "phi3": (
        "Phi3",
        {
            "hidden_size": 160,
            "num_key_value_heads": 2,
            "sliding_window": 28,
            "original_max_position_embeddings": 512,
        },
    ),
    "phi3-longrope": (
        "Phi3",
        {
            "hidden_size": 192,
            "original_max_position_embeddings": 256,
            "rope_parameters": longrope(96),
        },
    ),
    "phi3-partial": (
        "Phi3",
        {
            "hidden_size": 256,
            "tie_word_embeddings": True,
            # Texts of tests are longer: the long factors hold.
            "original_max_position_embeddings": 48,
            "rope_parameters": longrope(
                96, partial_rotary_factor=0.75, original_max_position_embeddings=48
            ),
        },
    ),
    "olmo": ("Olmo", {"num_key_value_heads": 2, "head_dim": 96, "attention_bias": True}),
    "olmo2": ("Olmo2", {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4}),
    "olmo3": (
        "Olmo3",
        {
            "hidden_size": 224,
            "num_hidden_layers": 4,
            "sliding_window": 12,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
                "full_attention": YARN | {"rope_theta": 5e5, "attention_factor": 1.2},
            },
        },
    ),
    "granite": (
        "Granite",
        {
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.03,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
            "tie_word_embeddings": True,
        },
    ),
    "granite4": (
        "GraniteMoeHybrid",
        {
            "layer_types": ["full_attention"] * 2,
            "num_local_experts": 0,
            "shared_intermediate_size": 160,
            "position_embedding_type": "rope",
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.1,
            "residual_multiplier": 0.4,
            "logits_scaling": 8.0,
        },
    ),
    "granite_swa": (
        "GraniteSWA",
        {
            "num_hidden_layers": 4,
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.1,
            "residual_multiplier": 0.4,
            "logits_scaling": 8.0,
            "sliding_window": 21,
            "layer_rope_theta": [1e4, 0, 1e4, 5e5],
            "num_key_value_heads": 2,
        },
    ),
    "smollm3": (
        "SmolLM3",
        {
            "num_hidden_layers": 4,
            "no_rope_layers": [1, 0, 1, 0],
            "use_sliding_window": True,
            "sliding_window": 30,
        },
    ),
    "seed_oss": (
        "SeedOss",
        {
            "hidden_size": 160,
            "head_dim": 100,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "attention_out_bias": True,
        },
    ),
    "glm": ("Glm", {"head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2}),
    "glm4": ("Glm4", {"head_dim": 128, "attention_bias": False}),
    "ernie4_5": ("Ernie4_5", {"head_dim": 96, "use_bias": True}),
    "helium": ("Helium", {"head_dim": 64}),
    "exaone": ("Exaone", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "exaone4": (
        "Exaone4",
        {
            "num_hidden_layers": 4,
            "sliding_window": 22,
            "sliding_window_pattern": 2,
            "num_key_value_heads": 2,
        },
    ),
    "cohere": (
        "Cohere",
        {"num_key_value_heads": 2, "layer_norm_eps": 1e-4, "logit_scale": 0.5},
    ),
    "cohere-norms": (
        "Cohere",
        {
            "hidden_size": 256,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "use_qk_norm": True,
            "layer_norm_eps": 1e-4,
        },
    ),
    "cohere2": (
        "Cohere2",
        {"num_hidden_layers": 4, "sliding_window": 20, "layer_types": ALTERNATING},
    ),
    "phi": ("Phi", {"num_key_value_heads": 2, "hidden_size": 192}),
    "gpt_neo": (
        "GPTNeo",
        {
            "num_hidden_layers": 3,
            "attention_types": [[["global", "local"], 1], [["local"], 1]],
            "window_size": 20,
        },
    ),
    "gpt_neox": ("GPTNeoX", {"num_attention_heads": 4, "hidden_size": 256}),
    "gpt_neox-sequential": (
        "GPTNeoX",
        {"use_parallel_residual": False, "attention_bias": False},
    ),
    "falcon": ("Falcon", {"hidden_size": 256, "num_attention_heads": 4}),
    "falcon-groups": (
        "Falcon",
        {
            "hidden_size": 256,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
            "bias": True,
        },
    ),
    "falcon-one-norm": (
        "Falcon",
        {
            "hidden_size": 256,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "num_ln_in_parallel_attn": 1,
            "new_decoder_architecture": True,
        },
    ),
    "gptj": ("GPTJ", {"rotary_dim": 32}),
    "starcoder2": ("Starcoder2", {"hidden_size": 192, "sliding_window": 36}),
    "stablelm": ("StableLm", {"hidden_size": 160, "num_key_value_heads": 2, "use_qkv_bias": True}),
    "stablelm-parallel": (
        "StableLm",
        {"hidden_size": 160, "num_key_value_heads": 2, "use_parallel_residual": True},
    ),
    "stablelm-norms": (
        "StableLm",
        {
            "hidden_size": 256,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "use_parallel_residual": True,
            "qk_layernorm": True,
        },
    ),
    "nemotron": (
        "Nemotron",
        {"hidden_size": 256, "head_dim": 64, "num_attention_heads": 4, "mlp_bias": True},
    ),
    "arcee": ("Arcee", {"num_key_value_heads": 2, "rope_parameters": YARN}),
    "hyperclovax": (
        "HyperCLOVAX",
        {
            "embedding_multiplier": 10.0,
            "attention_multiplier": 0.05,
            "residual_multiplier": 0.7,
            "logits_scaling": 0.125,
        },
    ),
    "internlm3": (
        "InternLM3",
        {
            "head_dim": 96,
            "rope_parameters": {"rope_type": "dynamic", "factor": 6.0, "rope_theta": 1e5},
        },
    ),
    "cwm": (
        "Cwm",
        {
            "head_dim": 64,
            "num_hidden_layers": 5,
            "sliding_window": 20,
            "rope_parameters": LLAMA3,
        },
    ),
    "iquestcoder": ("IQuestCoder", {"head_dim": 128}),
    "jais2": ("Jais2", {"hidden_size": 192, "num_key_value_heads": 2}),
    "opt": ("OPT", {"ffn_dim": 256, "word_embed_proj_dim": 128}),
    "gpt2": ("GPT2", {"n_inner": 192}),
    "gpt_bigcode": ("GPTBigCode", {"num_attention_heads": 4, "hidden_size": 256}),
    "mixtral": (
        "Mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 24, "head_dim": 64},
    ),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            "num_hidden_layers": 3,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 96,
            "shared_expert_intermediate_size": 160,
            "decoder_sparse_step": 2,  # the second layer alone has experts
        },
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "num_hidden_layers": 3,
            "head_dim": 64,
            "num_experts": 8,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 96,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
    "olmoe": (
        "Olmoe",
        {
            "num_key_value_heads": 2,
            "num_experts": 8,
            "num_experts_per_tok": 1,
            "intermediate_size": 96,
        },
    ),
    "granitemoe": (
        "GraniteMoe",
        {
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.1,
            "residual_multiplier": 0.5,
            "logits_scaling": 8.0,
            "tie_word_embeddings": True,
        },
    ),
    "phimoe": (
        "Phimoe",
        {
            "num_key_value_heads": 2,
            "num_local_experts": 4,
            "router_jitter_noise": 0.3,  # so that near experts share a softmax
            "attention_bias": True,
            "lm_head_bias": True,
            "sliding_window": 40,
            "rope_parameters": longrope(64, short_mscale=1.2, long_mscale=1.2),
        },
    ),
    "gpt_oss": (
        "GptOss",
        {
            # Two groups of 64 and outliers, or with no outliers a short last group.
            "hidden_size": 160,
            "intermediate_size": 96,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "sliding_window": 18,
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "rope_parameters": YARN | {"truncate": False, "beta_fast": 32.0, "beta_slow": 1.0},
        },
    ),
    "glm4_moe": (
        "Glm4Moe",
        {
            "num_hidden_layers": 3,
            "head_dim": 64,
            "attention_bias": True,
            "use_qk_norm": True,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_group": 4,
            "topk_group": 2,
            "n_shared_experts": 2,
            "moe_intermediate_size": 96,
            "routed_scaling_factor": 1.5,
        },
    ),
    "minimax_m2": (
        "MiniMaxM2",
        {
            # Half of the channels turn, of heads that one norm spans.
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "partial_rotary_factor": 0.5,
            },
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "intermediate_size": 96,
        },
    ),
    "ernie4_5_moe": (
        "Ernie4_5_Moe",
        {
            "num_hidden_layers": 4,
            "moe_num_experts": 6,
            "moe_k": 3,
            "moe_intermediate_size": 64,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 2,  # the first layer and the last one are dense
            "tie_word_embeddings": True,
        },
    ),
    "dots1": (
        "Dots1",
        {
            "num_hidden_layers": 3,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_group": 2,
            "n_shared_experts": 2,
            "moe_intermediate_size": 64,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 2.5,
            "sliding_window": 26,
            "max_window_layers": 2,
        },
    ),
    "solar_open": (
        "SolarOpen",
        {
            "head_dim": 64,
            "attention_bias": True,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 96,
            "routed_scaling_factor": 1.5,
        },
    ),
    "exaone_moe": (
        "ExaoneMoe",
        {
            "num_hidden_layers": 4,
            "num_key_value_heads": 2,
            "sliding_window": 22,
            "sliding_window_pattern": 2,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 96,
        },
    ),
    "hy_v3": (
        "HYV3",
        {
            "num_hidden_layers": 3,
            "head_dim": 64,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 96,
            "attention_bias": True,
        },
    ),
    "flex_olmo": (
        "FlexOlmo",
        {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 3},
    ),
    "granitemoeshared": (
        "GraniteMoeShared",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 160,
            "attention_multiplier": 0.1,
            "residual_multiplier": 0.5,
        },
    ),
    "granitemoe_swa": (
        "GraniteMoeSWA",
        {
            "num_hidden_layers": 4,
            "num_key_value_heads": 2,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 96,
            "attention_multiplier": 0.1,
            "residual_multiplier": 0.4,
            "sliding_window": 17,
            "layer_rope_theta": [1e4, 0, 5e5, 1e4],
        },
    ),
    "mellum": (
        "Mellum",
        {
            "num_hidden_layers": 3,
            "head_dim": 64,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "sliding_window": 14,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "mlp_layer_types": ["sparse", "dense", "sparse"],
        },
    ),
}
_KNOWN = {name.removesuffix("Config") for name in dir(transformers)}
UNKNOWN = sorted({prefix for prefix, _ in TINY.values()} - _KNOWN)
"""Families that this release of transformers does not have: nothing makes their tiny models."""
TINY = {name: entry for name, entry in TINY.items() if entry[0] not in UNKNOWN}
ALONE = dict.fromkeys(
    ("opt", "gpt2", "gpt_bigcode", "falcon", "falcon-groups", "falcon-one-norm", "gptj"),
    ("intermediate_size", "num_key_value_heads"),
) | dict.fromkeys(("gpt_neo", "gpt_neox", "gpt_neox-sequential"), ("num_key_value_heads",))
"""Keys of COMMON that a family does not have."""


def tiny_config(name: str, **sizes):
    """The config object of transformers; `sizes` in place of its own keys."""
    prefix, own = TINY[name]
    options = {k: v for k, v in COMMON.items() if k not in ALONE.get(name, ())} | own
    options |= sizes
    head = "LMHeadModel" if prefix == "GPT2" else "ForCausalLM"
    options["architectures"] = [prefix.removesuffix("Text") + head]
    return getattr(transformers, f"{prefix}Config")(**options)


def model_class(prefix: str) -> type:
    """The class of transformers that has a language head."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    # Some share Llama's.
    kind = getattr(transformers, f"{prefix}Config").model_type
    return getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])


def tiny_model(name: str, seed: int = 0, **sizes):
    """A random model whose every weight, bias and norm matters, float32, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    config = tiny_config(name, **sizes)
    config._attn_implementation = "eager"  # the others leave out soft-caps in some releases
    config._experts_implementation = "eager"
    model = model_class(TINY[name][0])(config).eval()
    offset = name.startswith(("gemma", "vaultgemma", "nemotron"))  # they store norm weights less 1
    with torch.no_grad():
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if key.endswith("bias"):
                parameter.copy_(0.2 * noise)
            elif key.endswith("sinks"):
                parameter.copy_(noise)
            elif key.endswith("experts.gate_up_proj") and name == "gpt_oss":
                parameter.copy_(0.2 * noise)  # so that some gates and ups are clamped at 7
            elif key.endswith("experts.down_proj") and name == "gpt_oss":
                parameter.copy_(0.02 * noise)  # and what they make is of order 1 all the same
            elif "norm" in key:
                parameter.copy_((0.0 if offset else 1.0) + 0.2 * noise)
            else:
                # Activations and logits of order 1, whatever the width.
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    return model


def save_tiny(folder: Path, name: str, *, seed: int = 0, dtype=torch.float32, **sizes) -> Path:
    """The model with a byte tokenizer, as transformers saves it."""
    tiny_model(name, seed, **sizes).to(dtype).save_pretrained(folder)
    write_byte_tokenizer(folder)
    return folder


def save_mxfp4(folder: Path, *, seed: int = 0):
    """A gpt-oss folder whose experts are in MXFP4, as OpenAI releases it, and what it holds.

    Returns:
        transformers' model with the dequantized weights, float32, in eval mode.
    """
    import json

    from safetensors.torch import save_file
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    model = tiny_model("gpt_oss", seed)
    generator = torch.Generator().manual_seed(seed)
    tensors = dict(model.state_dict())
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        count, columns, rows = tensors.pop(name).shape
        shape = (count, rows, columns // 32)
        blocks = torch.randint(256, (*shape, 16), dtype=torch.uint8, generator=generator)
        # Factors of about the size that a tiny model's weights have.
        mean = 124 if "gate_up" in name else 120
        scales = torch.randint(mean - 2, mean + 1, shape, generator=generator).to(torch.uint8)
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks, scales
        dequantized = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
        model.get_parameter(name).data.copy_(dequantized.float())
    folder.mkdir()
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    keep = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"]
    config = model.config.to_dict() | {
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": keep}
    }
    (folder / "config.json").write_text(json.dumps(config))
    write_byte_tokenizer(folder)
    return model


def decode_context(position: int, block_size: int, device="cpu"):
    """One new token at `position` of the only sequence, its KV blocks in order."""
    blocks = position // block_size + 1
    return ForwardContext(
        positions=torch.tensor([position], device=device),
        slot_mapping=torch.tensor([position], device=device),
        block_tables=torch.arange(blocks, dtype=torch.int32, device=device)[None],
        cu_seqlens_q=torch.tensor([0, 1], dtype=torch.int32, device=device),
        seq_lens=torch.tensor([position + 1], dtype=torch.int32, device=device),
        max_seqlen_q=1,
        max_seq_len=position + 1,
        num_decodes=1,
    )
