"""Log-probabilities of given tokens on a GPU, by Quatom's engine and by vLLM.

Both compute in 16 bits, where every sum has another order. One moved code of an activation moves
all that follows, so that texts of random networks part soon. What is compared is the mean
difference of the log-probabilities of given tokens. Quatom's engine in float16 and in bfloat16 is
the measure: what runs in float16 must be nearer to the other than the engine's two formats are to
each other. A wrong slice or slot is worth 1 and more (test_vllm_parallel.py).
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.conftest import LLAMA

MODEL = LLAMA | {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 2048,
}
TEXT = b"Python is a programming language that many people learn first, and like. " * 16
PROMPTS = [[256, *TEXT[:length]] for length in (40, 130, 700, 1100)]
NEW_TOKENS = 48
SETTINGS = {
    "dtype": "float16",
    "max_model_len": 2048,
    "max_num_batched_tokens": 512,  # the longer prompts in chunks, beside decodes
    "kv_cache_memory_bytes": 2**28,
    "gpu_memory_utilization": 0.05,
}
"""Of vLLM's engine."""


def own_scores(folder: Path, dtype: torch.dtype) -> Tensor:
    """Log-probabilities of the prompts' tokens by Quatom's engine, all prompts in a row."""
    from quatom import LLM, SamplingParams

    engine = LLM(folder, device="cuda", dtype=dtype, kv_cache_memory=2**28, max_num_seqs=8)
    sampling = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    answers = engine.generate(PROMPTS, sampling)
    return torch.tensor([at.logprob for answer in answers for at in answer.prompt_logprobs])


def vllm_scores(answers: list[Any]) -> Tensor:
    """The same by vLLM."""
    return torch.tensor(
        [
            at[token].logprob
            for answer in answers
            for at, token in zip(
                answer.prompt_logprobs[1:], answer.prompt_token_ids[1:], strict=True
            )
        ]
    )


def decode_scores(answers: list[Any]) -> Tensor:
    """Log-probabilities of the tokens that vLLM wrote, as its decodes computed them."""
    return torch.tensor(
        [
            at[token].logprob
            for answer in answers
            for at, token in zip(
                answer.outputs[0].logprobs, answer.outputs[0].token_ids, strict=True
            )
        ]
    )


def decodes_apart(written: list[Any], scored: list[Any]) -> float:
    """Mean difference of decodes, in CUDA graphs where not eager, and a prefill over their tokens.

    Args:
        written: Answers to prompts.
        scored: Answers to the same prompts with what was written.
    """
    again = torch.stack([vllm_scores([answer])[-NEW_TOKENS:] for answer in scored]).flatten()
    return float((decode_scores(written) - again).abs().mean())
