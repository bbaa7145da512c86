"""vLLM with the plugin on a GPU against Quatom's own engine there: `pytest -m gpu`, where vLLM is.

`gpu_scores` says what is compared, and why.
"""

import os

import pytest

pytest.importorskip("vllm", reason="vLLM lives in an environment of its own")
os.environ.setdefault("TORCH_COMPILE_DISABLE", "0")  # vllm_engine.py takes what is set

import torch

from tests.conftest import make_model
from tests.families.models import save_tiny
from tests.integrations.checkpoints import tiny_checkpoint, tiny_recipe
from tests.integrations.gpu_scores import (
    MODEL,
    NEW_TOKENS,
    PROMPTS,
    SETTINGS,
    decodes_apart,
    own_scores,
    vllm_scores,
)
from tests.integrations.vllm_engine import vllm_answers

pytestmark = pytest.mark.gpu

MIXTRAL = {
    "hidden_size": 512,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "sliding_window": None,
    "max_position_embeddings": 2048,
}


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
    settings = SETTINGS | {"enforce_eager": eager}
    written, scored = vllm_answers(folder, PROMPTS, NEW_TOKENS, **settings)
    moved = float((vllm_scores(written) - want).abs().mean())
    steps = decodes_apart(written, scored)
    print(f"{model} {recipe}: engine {noise:.4f}, plugin {moved:.4f}, decodes {steps:.4f}")
    assert moved < noise
    assert steps < noise
