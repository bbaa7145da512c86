"""Random mixtures of experts: every preset runs, and tokens spread over the experts."""

from math import prod

import pytest
import torch

from quatom.benchmark.model_shapes import find_shape
from quatom.benchmark.random_weights import random_model, weight_bytes
from quatom.engine.config import EngineConfig
from quatom.engine.llm import LLM, Engine, SamplingParams
from quatom.modeling.context import full_sequences_context
from quatom.ops.backend import Backend
from quatom.plan import plan
from quatom.presets import PRESETS

SHAPE = "tiny-moe"


@pytest.mark.parametrize(
    ("shape", "name"), [(SHAPE, name) for name in PRESETS] + [("tiny-gpt-oss", "quatom-w4a8kv4")]
)
def test_every_preset_runs_and_generates(shape, name):
    loaded = random_model(shape, PRESETS[name], device="cpu")
    engine = Engine(loaded, EngineConfig(max_num_seqs=4, max_num_batched_tokens=256))
    params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    outputs = LLM.from_engine(engine).generate([[1, 2, 3], [4] * 70], params)
    assert [len(output.token_ids) for output in outputs] == [5, 5]


@pytest.mark.parametrize("name", ["fp16", "quatom-w4a8kv4"])
def test_every_expert_gets_tokens_and_none_gets_most(name):
    loaded = random_model(SHAPE, PRESETS[name], device="cpu", backend=Backend.REFERENCE)
    chosen = []
    for block in loaded.model.blocks:
        if block.router is not None:
            block.router.register_forward_hook(lambda _, __, out: chosen.append(out.expert_ids))
    context = full_sequences_context(4, 64, 32, loaded.device)
    ids = torch.randint(512, (256,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        loaded.model(ids, context, loaded.model.allocate_kv_cache(8, 32))
    assert len(chosen) == 2  # the first layer is dense
    for experts in chosen:
        tokens = experts.long().flatten().bincount(minlength=16)
        # 256 tokens choose 4 of 16 each: 64 per expert if they were even.
        assert tokens.min() > 0
        assert tokens.max() < 3 * 64


def test_bytes_of_float_experts_are_counted():
    loaded = random_model(SHAPE, PRESETS["fp16"], device="cpu", dtype=torch.bfloat16)
    resolved = plan(find_shape(SHAPE), PRESETS["fp16"])
    assert weight_bytes(loaded)["linears"] == 2 * resolved.num_weights
    experts = [s for s in resolved.sites() if s.experts]
    assert len(experts) == 4
    assert sum(prod(lin.shape) for s in experts for lin in s.linears) == 2 * 16 * 3 * 96 * 256
