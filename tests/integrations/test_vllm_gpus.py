"""vLLM with the plugin on two GPUs against one: `pytest -m gpu`, where vLLM and two GPUs are.

`gpu_scores` says what is compared, and why. One run of vLLM on one GPU, in eager mode, is what all
layouts over two are compared with. The layouts with Ray need Ray.
"""

import importlib.util
import os
from dataclasses import replace

import pytest

pytest.importorskip("vllm", reason="vLLM lives in an environment of its own")
os.environ.setdefault("TORCH_COMPILE_DISABLE", "0")  # vllm_engine.py takes what is set
os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # functions sent to workers

import torch

from tests.conftest import make_model
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
from tests.integrations.vllm_engine import generate, vllm_answers, vllm_engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

TWO_BLOCKS = MODEL | {
    "hidden_size": 1024,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
}
"""Two tensor-parallel blocks of whole groups and 128 outliers each."""
LAYOUTS = {
    "tensor": {"tensor_parallel_size": 2},
    "tensor-nccl": {"tensor_parallel_size": 2, "disable_custom_all_reduce": True},
    "pipeline": {"pipeline_parallel_size": 2},
    "ray": {"tensor_parallel_size": 2, "distributed_executor_backend": "ray"},
}
KEPT = ("NCCL_NVLS_ENABLE", "TORCH_SYMM_MEM_DISABLE_MULTICAST", "NVSHMEM_DISABLE_NVLS")
"""Variables that a machine sets where NVLink's multicast must stay off."""


def describe(worker):
    """Whether vLLM's own all-reduce runs in a worker, and its variables of `KEPT`."""
    from vllm.distributed import get_tp_group

    own = getattr(get_tp_group().device_communicator, "ca_comm", None)
    custom = own is not None and not own.disabled
    return custom, {name: os.environ.get(name) for name in KEPT}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, text_file):
    folder = tmp_path_factory.mktemp("checkpoints")
    source = make_model(folder / "two-blocks", TWO_BLOCKS)

    def make(name):
        recipe = replace(tiny_recipe(name), tensor_parallel=2)
        return tiny_checkpoint(folder, source, recipe, text_file)

    return make


@pytest.fixture(scope="module")
def on_one(checkpoint):
    """Scores on one GPU, and how far rounding alone moves them; made once per recipe."""
    known = {}

    def score(recipe):
        if recipe not in known:
            folder = checkpoint(recipe)
            half, brain = (own_scores(folder, dtype) for dtype in (torch.float16, torch.bfloat16))
            written, _ = vllm_answers(folder, PROMPTS, 1, **SETTINGS, enforce_eager=True)
            known[recipe] = vllm_scores(written), float((half - brain).abs().mean())
        return known[recipe]

    return score


@pytest.mark.parametrize("recipe", ["quatom-w4a8kv4", "atom-w4a4kv4", "w4a16"])
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_gpus_score_tokens_as_one(checkpoint, on_one, layout, recipe, eager, monkeypatch):
    """Recipes with one scale per token have one per rank, so that every code may differ by a step.

    That moves scores by less than float16 and bfloat16 differ, as everything here must.
    """
    if layout == "ray" and importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    want, noise = on_one(recipe)
    if layout == "pipeline":  # vLLM's queue of stages needs its engine in a process of its own
        monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    folder, settings = checkpoint(recipe), SETTINGS | LAYOUTS[layout] | {"enforce_eager": eager}
    with vllm_engine(folder, **settings) as engine:
        workers = engine.collective_rpc(describe)
        written = generate(engine, PROMPTS, NEW_TOKENS, prompt_logprobs=0)
        whole = [[*answer.prompt_token_ids, *answer.outputs[0].token_ids] for answer in written]
        scored = generate(engine, whole, 1, prompt_logprobs=0)
    moved = float((vllm_scores(written) - want).abs().mean())
    steps = decodes_apart(written, scored)
    numbers = f"rounding {noise:.4f}, two GPUs {moved:.4f}, decodes {steps:.4f}"
    print(f"{layout} {recipe} {'eager' if eager else 'compiled'}: {numbers}, {workers}")
    assert len(workers) == 2
    assert [custom for custom, _ in workers] == [layout in ("tensor", "ray")] * 2
    for _, variables in workers:
        assert variables == {name: os.environ.get(name) for name in KEPT}
    assert moved < noise
    assert steps < noise
