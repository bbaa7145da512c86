"""vLLM on a CPU, in this process, and Quatom's own engine beside it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TORCH_COMPILE_DISABLE": os.environ.get("TORCH_COMPILE_DISABLE", "1"),
    "VLLM_ENABLE_V1_MULTIPROCESSING": os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING", "0"),
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "GLOO_SOCKET_IFNAME": "lo",
}

TEXT = b"Python is a programming language that many people learn first, and like. " * 2
PROMPTS = [[256, *TEXT[:length]] for length in (3, 17, 43, 70, 120)]
"""Shorter and longer than a block; all begin alike, so that prefixes can be shared."""
NEW_TOKENS = 12


@dataclass
class Greedy:
    """What a prompt was continued with."""

    tokens: list[int]
    logprobs: list[float]


@contextmanager
def vllm_engine(folder: Path, **options: Any) -> Iterator[Any]:
    """vLLM's engine in this process, small and eager unless options say otherwise."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    single = options.get("tensor_parallel_size", 1) * options.get("pipeline_parallel_size", 1) == 1
    settings: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 256,
        "max_num_seqs": 8,
        "enforce_eager": True,
        "kv_cache_memory_bytes": 2**26,
        "block_size": 32,
        "distributed_executor_backend": "uni" if single else "mp",
    }
    engine = LLM(str(folder), **(settings | options))
    try:
        yield engine
    finally:
        engine.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


def generate(engine: Any, prompts: list[list[int]], count: int, **sampling: Any) -> list[Any]:
    """vLLM's answers of `count` greedy tokens to each prompt."""
    from vllm import SamplingParams

    asked = SamplingParams(
        temperature=0.0, max_tokens=count, logprobs=1, ignore_eos=True, **sampling
    )
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    answers: list[Any] = engine.generate(requests, asked, use_tqdm=False)
    return answers


def vllm_greedy(
    folder: Path, prompts: list[list[int]] = PROMPTS, *, rounds: int = 1, **options: Any
) -> list[Greedy]:
    """Greedy continuations by vLLM; of the last round, where prompts are sent several times."""
    with vllm_engine(folder, **options) as engine:
        for _ in range(rounds):
            answers = generate(engine, prompts, NEW_TOKENS)
    found = []
    for answer in answers:
        tokens = list(answer.outputs[0].token_ids)
        logprobs = answer.outputs[0].logprobs
        found.append(
            Greedy(tokens, [at[token].logprob for at, token in zip(logprobs, tokens, strict=True)])
        )
    return found


def vllm_answers(
    folder: Path, prompts: list[list[int]], count: int, **options: Any
) -> tuple[list[Any], list[Any]]:
    """vLLM's answers with log-probabilities of the prompts: to these, and to what it wrote."""
    with vllm_engine(folder, **options) as engine:
        written = generate(engine, prompts, count, prompt_logprobs=0)
        whole = [[*answer.prompt_token_ids, *answer.outputs[0].token_ids] for answer in written]
        return written, generate(engine, whole, 1, prompt_logprobs=0)


def own_greedy(folder: Path, prompts: list[list[int]] = PROMPTS) -> list[Greedy]:
    """Greedy continuations by Quatom's own engine."""
    from quatom import LLM, SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, logprobs=1, ignore_eos=True)
    answers = LLM(folder).generate(prompts, sampling)
    outputs = [answer.outputs[0] for answer in answers]
    return [Greedy(list(o.token_ids), [at.logprob for at in o.logprobs]) for o in outputs]


def assert_agree(found: list[Greedy], wanted: list[Greedy], *, flips: int = 0) -> None:
    """Equal tokens and log-probabilities.

    Two float32 computations in another order differ by 1e-5 of a logit here. That may move an
    activation across a rounding boundary: one code then differs by a step, which moves later
    log-probabilities by up to 0.05 on these two layers (`flips`: prompts where it may happen).
    """
    moved = 0
    for one, other in zip(found, wanted, strict=True):
        assert one.tokens == other.tokens
        worst = max(abs(a - b) for a, b in zip(one.logprobs, other.logprobs, strict=True))
        assert worst < 0.05
        moved += worst > 1e-4
    assert moved <= flips
