"""vLLM with the plugin on a GPU against Quatom's own engine there: `pytest -m gpu`, where vLLM is.

Both compute in 16 bits, where every sum has another order. One moved code of an activation moves
all that follows, so that texts of random networks part soon. What is compared is the mean
difference of the log-probabilities of given tokens. Quatom's engine in float16 and in bfloat16 is
the measure: the plugin, in float16, must be nearer to the engine than the engine's two formats are
to each other. A wrong slice or slot is worth 1 and more (test_vllm_parallel.py).
"""

import os

import pytest

pytest.importorskip("vllm", reason="vLLM lives in an environment of its own")
os.environ.setdefault("TORCH_COMPILE_DISABLE", "0")  # vllm_engine.py takes what is set

import torch

from tests.conftest import LLAMA, make_model
from tests.families.models import save_tiny
from tests.integrations.checkpoints import tiny_checkpoint, tiny_recipe
from tests.integrations.vllm_engine import vllm_answers

pytestmark = pytest.mark.gpu

MODEL = LLAMA | {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 2048,
}
MIXTRAL = {
    "hidden_size": 512,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "sliding_window": None,
    "max_position_embeddings": 2048,
}
TEXT = b"Python is a programming language that many people learn first, and like. " * 16
PROMPTS = [[256, *TEXT[:length]] for length in (40, 130, 700, 1100)]
NEW_TOKENS = 48


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, text_file):
    folder = tmp_path_factory.mktemp("checkpoints")

    def make(model, recipe):
        source = folder / model
        if not source.exists():
            if model == "llama":
                make_model(source, MODEL)
            else:
                save_tiny(source, model, **MIXTRAL)
        return tiny_checkpoint(folder, source, tiny_recipe(recipe), text_file)

    return make


def own_scores(folder, dtype):
    """Log-probabilities of the prompts' tokens by Quatom's engine, all prompts in a row."""
    from quatom import LLM, SamplingParams

    engine = LLM(folder, device="cuda", dtype=dtype, kv_cache_memory=2**28, max_num_seqs=8)
    sampling = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    answers = engine.generate(PROMPTS, sampling)
    return torch.tensor([at.logprob for answer in answers for at in answer.prompt_logprobs])


def vllm_scores(answers):
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


@pytest.mark.parametrize(
    ("model", "recipe"),
    [
        ("llama", "quatom-w4a8kv4"),
        ("llama", "atom-w4a4kv4"),
        ("llama", "w4a16"),
        ("mixtral", "quatom-w4a8kv4"),
        ("mixtral", "w4a16"),
    ],
)
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_vllm_on_a_gpu_scores_tokens_as_our_engine(checkpoint, model, recipe, eager):
    folder = checkpoint(model, recipe)
    want = own_scores(folder, torch.float16)
    noise = float((own_scores(folder, torch.bfloat16) - want).abs().mean())
    settings = {
        "dtype": "float16",
        "max_model_len": 2048,
        "max_num_batched_tokens": 512,  # the longer prompts in chunks, beside decodes
        "kv_cache_memory_bytes": 2**28,
        "gpu_memory_utilization": 0.3,
        "enforce_eager": eager,
    }
    written, scored = vllm_answers(folder, PROMPTS, NEW_TOKENS, **settings)
    moved = float((vllm_scores(written) - want).abs().mean())
    # Decodes, in CUDA graphs where not eager, against a prefill over the same tokens.
    decoded = torch.tensor(
        [
            at[token].logprob
            for answer in written
            for at, token in zip(
                answer.outputs[0].logprobs, answer.outputs[0].token_ids, strict=True
            )
        ]
    )
    again = torch.stack([vllm_scores([answer])[-NEW_TOKENS:] for answer in scored]).flatten()
    steps = float((decoded - again).abs().mean())
    print(f"{model} {recipe}: engine {noise:.4f}, plugin {moved:.4f}, decodes {steps:.4f}")
    assert moved < noise
    assert steps < noise
