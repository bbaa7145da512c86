"""Keys of a config.json that cannot change what a decoder computes at inference."""

from typing import Any

# What the file is, who wrote it and how the model was loaded.
_ORIGIN = """
    architectures attn_implementation auto_map base_model_name_or_path chat_template
    compression_config custom_pipelines distributed_config dtype experts_implementation
    finetuning_task generation_config is_composition is_llama_config language library_name license
    model_name model_type name_or_path quantization_config sparsity_config task_specific_params
    torch_dtype transformers.js_config transformers_version trust_remote_code use_cache
    vocab_file
"""
# Training; dropout, losses and initialization have rules below.
_TRAINING = """
    aux_loss_alpha gradient_checkpointing layerdrop loss_type neftune_noise_alpha
    output_router_logits pretraining_tp seq_aux tf_legacy_loss use_gradient_checkpointing
    use_reentrant z_loss
"""
# Heads of other tasks.
_TASKS = """
    id2label ignore_index label2id label_smoothing num_labels problem_type
"""
# How it is computed, not what: attention in another order, softmax in float32.
_METHOD = """
    attention_softmax_in_fp32 bf16 cache_config cache_implementation chunk_size_feed_forward
    compile_config ep_size flash_attn fp16 keys_to_ignore_at_inference logits_to_keep
    num_logits_to_keep output_attentions output_hidden_states prefill_chunk_size
    reorder_and_upcast_attn return_dict scale_attention_softmax_in_fp32 tp_size
    use_flash_attention use_flash_attention_2 use_flash_attn
"""
# Lengths that a tokenizer or trainer used; first layer with a window, in families without windows.
_LENGTHS = """
    context_length max_seq_len max_seq_length max_sequence_length max_tokenizer_truncation
    max_window_layers model_max_length seq_length
"""
# Tokens that generation does not need.
_TOKENS = """
    bos_token decoder_start_token_id eos_token mask_token_id pad_token pad_token_id prefix
    sep_token_id unk_token unk_token_id
"""
# Generation settings, which old files keep here.
_GENERATION = """
    assistant_ensemble_weight max_cache_len speculation_type use_mtp
    assistant_confidence_threshold assistant_early_exit assistant_lookbehind
    assistant_temperature bad_words_ids begin_suppress_tokens constraints
    continuous_batching_config disable_compile diversity_penalty do_sample dola_layers
    early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff
    eta_cutoff exponential_decay_length_penalty force_words_ids forced_bos_token_id
    forced_decoder_ids forced_eos_token_id guidance_scale is_assistant length_penalty low_memory
    max_length max_matching_ngram_size max_new_tokens max_time min_length min_new_tokens min_p
    no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule num_beam_groups
    num_beams num_return_sequences output_logits output_scores penalty_alpha
    prompt_lookup_num_tokens remove_invalid_values renormalize_logits repetition_penalty
    return_dict_in_generate return_legacy_cache sequence_bias stop_strings suppress_tokens
    target_lookbehind temperature token_healing top_h top_k top_p typical_p use_model_defaults
    watermarking_config
"""
HARMLESS = frozenset(
    " ".join((_ORIGIN, _TRAINING, _TASKS, _METHOD, _LENGTHS, _TOKENS, _GENERATION)).split()
)
"""Names that may have any value."""

HARMLESS_PREFIXES = (
    *("_", "axolotl_", "mergekit_", "peft_", "trl_", "unsloth_"),  # private notes of a library
    "freeze_",
    "init_",
    "initializer_",
    "lora_",  # adapters that are not merged would be tensors of their own, which are refused
    "summary_",  # a head of another task
    "tokenizer_",
    "use_fused_",  # how it is computed
)
"""Names that begin so may have any value."""
HARMLESS_SUFFIXES = (
    *("_token_id", "_token_index"),  # which token stands for what, an image for example
    *("dropout", "_dropout_p", "_dropout_prob", "_dropout_rate", "_pdrop"),
    *("_loss_coef", "_loss_coeff", "_loss_weight"),
)
"""Names that end so may have any value."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "attention_bias": (False,),
    "is_causal": (True,),
    "is_decoder": (False, True),
    "is_encoder_decoder": (False,),
    "lm_head_bias": (False,),
    "mlp_bias": (False,),
    "num_nextn_predict_layers": (0,),
    "partial_rotary_factor": (1.0,),
    "pruned_heads": ({},),
    "qk_layer_norms": (False,),
    "rope_interleaved": (False,),
    "scale_attn_weights": (True,),
    "tie_encoder_decoder": (False,),
    "torchscript": (False,),
    "use_bfloat16": (False,),
    "use_bidirectional_attention": (False,),
    "use_mrope": (False,),
    "use_sliding_window": (False,),
}
"""Names whose listed values, and no others, leave every family as it is."""

CHANGING: dict[str, str] = {
    "dual_chunk_attention_config": "attention in chunks of long texts; remove it, and set "
    "max_position_embeddings to at most its chunk_size - local_size: shorter texts need no chunks",
    "quantization": "weights as MLX quantizes them; take the floating-point model",
}
"""Names that released files hold and no family reads -> what they ask for, and what to do."""
