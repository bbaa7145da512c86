"""On the reference backend a request gives bit-equal log-probabilities alone and in any crowd."""

import random

import pytest

from quatom.benchmark.random_weights import random_model
from quatom.engine.config import EngineConfig
from quatom.engine.engine import Engine
from quatom.engine.llm import LLM
from quatom.engine.sampling import SamplingParams
from quatom.ops.backend import Backend
from quatom.recipe import PRESETS

PARAMS = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, logprobs=0)


def prompts():
    rng = random.Random(0)
    made = [[rng.randrange(256) for _ in range(rng.randint(1, 150))] for _ in range(10)]
    # Prefixes that the crowd finds in the cache, and the lone request does not.
    return [*made, made[0] + made[1], (made[2] * 3)[:140], [*made[3], 1]]


def logprobs(output):
    return [(entry.token_id, entry.logprob) for entry in output.outputs[0].logprobs]


@pytest.fixture(scope="module")
def alone(tiny_llama_dir):
    options = EngineConfig(prefix_caching=False, max_model_len=320)
    llm = LLM(tiny_llama_dir, device="cpu", config=options)
    return [logprobs(llm.generate([prompt], PARAMS)[0]) for prompt in prompts()]


CROWDS = pytest.mark.parametrize(
    "limits",
    [
        {"max_num_batched_tokens": 2048},  # all prompts in one step
        {"max_num_batched_tokens": 88},  # in chunks, mixed with decodes
        {  # with preemption
            "max_num_batched_tokens": 150,
            "kv_cache_memory": 13 * 32 * 2048,
            "forecast_admission": False,
        },
        {"max_num_batched_tokens": 150, "overlap": True},
    ],
)


@CROWDS
def test_a_crowd_changes_no_bit(tiny_llama_dir, alone, limits):
    config = EngineConfig(max_num_seqs=12, max_model_len=320, **limits)
    llm = LLM(tiny_llama_dir, device="cpu", config=config)
    together = llm.generate(prompts(), PARAMS)
    assert [logprobs(output) for output in together] == alone
    tight = "kv_cache_memory" in limits
    assert (llm.engine.scheduler.num_preemptions > 0) == tight
    assert (llm.engine.scheduler.prefix_hits > 0) == (not tight)


@pytest.fixture(
    scope="module",
    params=[
        (
            "atom-w4a4kv4",
            None,
        ),  # int8 products where the CPU has them; keys before rotary embedding
        ("atom-w4a4kv4", Backend.REFERENCE),
        ("quatom-w4a8kv4", None),
    ],
    ids=lambda p: f"{p[0]}-{p[1]}",
)
def quantized(request):
    """A tiny quantized model, and what it gives each prompt alone."""
    name, backend = request.param
    loaded = random_model("tiny", PRESETS[name], device="cpu", backend=backend)
    engine = Engine(loaded, EngineConfig(prefix_caching=False, max_model_len=320))
    llm = LLM.from_engine(engine)
    return loaded, [logprobs(llm.generate([prompt], PARAMS)[0]) for prompt in prompts()]


@CROWDS
def test_a_crowd_changes_no_bit_of_a_quantized_model(quantized, limits):
    loaded, alone = quantized
    limits = dict(limits)
    if "kv_cache_memory" in limits:  # 13 blocks of 32 tokens, as above
        limits["kv_cache_memory"] = 13 * sum(
            layer.bytes_per_block for layer in loaded.model.allocate_kv_cache(1, 32)
        )
    config = EngineConfig(max_num_seqs=12, max_model_len=320, **limits)
    llm = LLM.from_engine(Engine(loaded, config))
    together = llm.generate(prompts(), PARAMS)
    assert [logprobs(output) for output in together] == alone
    tight = "kv_cache_memory" in limits
    assert (llm.engine.scheduler.num_preemptions > 0) == tight
    assert (llm.engine.scheduler.prefix_hits > 0) == (not tight)
