"""A request gives the same in any crowd: exactly with integers, up to rounding with floats.

The order of a float sum, and so its last bits, may depend on how many rows a product has. So the
scheduler is tested with a model of integers, and real models are compared with themselves within
the effect of a disturbance of the size of rounding.
"""

import random
from functools import cache
from statistics import fmean

import pytest
import torch

from quatom.benchmark.random_weights import random_model
from quatom.engine import sequence as sequence_module
from quatom.engine.block_pool import block_digest
from quatom.engine.config import EngineConfig
from quatom.engine.engine import Engine
from quatom.engine.llm import LLM
from quatom.engine.sampling import SamplingParams
from quatom.loading import load
from quatom.ops.backend import Backend
from quatom.presets import PRESETS

from .doubles import HashCache, HashModel, expected_tokens, hash_loaded, state_of

NEW_TOKENS = 24
PARAMS = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=0)
SCORE = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, prompt_logprobs=1)
CROWDS = pytest.mark.parametrize(
    "limits",
    [
        {"max_num_batched_tokens": 2048},  # all prompts in one step
        {"max_num_batched_tokens": 88},  # in chunks, mixed with decodes
        {"max_num_batched_tokens": 150, "blocks": 13, "forecast_admission": False},  # preempted
        {"max_num_batched_tokens": 150, "overlap": True},
    ],
    ids=["one-step", "chunks", "preemption", "overlap"],
)


def prompts():
    rng = random.Random(0)
    made = [[rng.randrange(256) for _ in range(rng.randint(1, 150))] for _ in range(10)]
    # Prefixes that the crowd finds in the cache, and the lone request does not.
    return [*made, made[0] + made[1], (made[2] * 3)[:140], [*made[3], 1]]


def run_crowd(loaded, limits):
    """Every prompt at once; the crowd meets what its limits are meant to bring about."""
    limits = dict(limits)
    tight = "blocks" in limits
    if tight:
        one = sum(layer.bytes_per_block for layer in loaded.model.allocate_kv_cache(1, 32))
        limits["kv_cache_memory"] = limits.pop("blocks") * one
    engine = Engine(loaded, EngineConfig(max_num_seqs=12, max_model_len=320, **limits))
    outputs = LLM.from_engine(engine).generate(prompts(), PARAMS)
    assert (engine.scheduler.num_preemptions > 0) == tight
    assert (engine.scheduler.prefix_hits > 0) == (not tight)
    return outputs


def states_differ(one, other):
    hidden = torch.tensor([[state_of(ids), 0.0] for ids in (one, other)], dtype=torch.float64)
    logits = HashModel().compute_logits(hidden)
    return not torch.equal(logits[0], logits[1])


def test_the_integer_model_depends_on_every_token_and_its_place():
    token_ids = prompts()[0][:60]
    for i in range(len(token_ids)):
        changed = [*token_ids[:i], (token_ids[i] + 1) % 256, *token_ids[i + 1 :]]
        assert states_differ(token_ids, changed)
        assert states_differ(token_ids, token_ids[:i] + token_ids[i + 1 :])
    for i in range(1, len(token_ids)):
        swapped = [*token_ids[: i - 1], token_ids[i], token_ids[i - 1], *token_ids[i + 1 :]]
        assert states_differ(token_ids, swapped) == (swapped != token_ids)


@CROWDS
def test_a_crowd_changes_no_token_of_the_integer_model(limits):
    outputs = run_crowd(hash_loaded(), limits)
    for prompt, output in zip(prompts(), outputs, strict=True):
        assert output.token_ids == expected_tokens(prompt, NEW_TOKENS)


def test_the_integer_model_sees_blocks_of_another_prefix(monkeypatch):
    """Their tokens are the same; what later layers keep of them is not."""
    monkeypatch.setattr(sequence_module, "block_digest", lambda _, ids: block_digest(b"", ids))
    llm = LLM.from_engine(Engine(hash_loaded(), EngineConfig(block_size=16, max_model_len=100)))
    same = list(range(16))
    for first in ([1] * 16, [2] * 16):
        llm.generate([[*first, 9]], PARAMS)
        got = llm.generate([[*first, *same, 9]], PARAMS)[0]
    assert got.num_cached_tokens == 32
    assert got.token_ids != expected_tokens([2] * 16 + same + [9], NEW_TOKENS)


def test_the_integer_model_sees_a_copy_that_is_missing(monkeypatch):
    monkeypatch.setattr(HashCache, "copy_blocks", lambda *_: None)
    llm = LLM.from_engine(Engine(hash_loaded(), EngineConfig(block_size=16, max_model_len=100)))
    prompt = list(range(32))
    for _ in range(2):
        got = llm.generate([prompt], PARAMS)[0]
    assert got.num_cached_tokens == 31
    assert got.token_ids != expected_tokens(prompt, NEW_TOKENS)


class Alone:
    """What a model gives one sequence at a time, and how far rounding may move it."""

    def __init__(self, loaded):
        self.loaded = loaded
        self.llm = LLM.from_engine(
            Engine(loaded, EngineConfig(prefix_caching=False, max_model_len=320))
        )
        self.score = cache(self._score)
        self.texts = [
            (tuple(prompt), tuple(output.token_ids))
            for prompt, output in zip(prompts(), self.llm.generate(prompts(), PARAMS), strict=True)
        ]
        self.limit = self._effect_of_rounding()

    def _score(self, prompt, tokens):
        """Log-probabilities of tokens that follow a prompt, and the largest at each place."""
        entries = self.llm.generate([[*prompt, *tokens]], SCORE)[0].prompt_logprobs
        entries = entries[len(prompt) - 1 :]
        assert tuple(entry.token_id for entry in entries) == tokens
        return [entry.logprob for entry in entries], [entry.top[0][1] for entry in entries]

    def _effect_of_rounding(self):
        """Mean change of a log-probability when every embedding is off by about 2**-18.

        Two orders of a float32 sum of K terms differ by up to K roundings of 2**-24 each, of random
        signs. 11 sums of at most 384 terms follow one another in two blocks and the head, so
        together they are off by about sqrt(11 * 384) * 2**-24 = 2**-18. What such an error does to
        the output is measured: a float model passes it on, a quantized one turns it into whole
        steps where a value lies near the middle between two codes.
        """
        embedding = self.loaded.model.embedding
        exact = embedding.data.clone()
        noise = torch.randn(exact.shape, generator=torch.Generator().manual_seed(0))
        embedding.data += embedding.data * noise * 2.0**-18
        disturbed = [self._score(*text)[0] for text in self.texts]
        embedding.data.copy_(exact)
        return mean_difference(disturbed, [self.score(*text)[0] for text in self.texts])


def mean_difference(ours, theirs):
    pairs = [pair for a, b in zip(ours, theirs, strict=True) for pair in zip(a, b, strict=True)]
    return fmean(abs(a - b) for a, b in pairs)


MODELS = [
    ("float32", None),
    ("atom-w4a4kv4", None),  # int8 products where the CPU has them; keys before rotary embedding
    ("quatom-w4a8kv4", Backend.REFERENCE),
]


@pytest.fixture(scope="module", params=MODELS, ids=lambda p: f"{p[0]}-{p[1]}")
def alone(request, tiny_llama_dir):
    name, backend = request.param
    if name == "float32":
        return Alone(load(tiny_llama_dir))
    return Alone(random_model("tiny", PRESETS[name], device="cpu", backend=backend))


@CROWDS
def test_a_crowd_moves_log_probabilities_no_more_than_rounding_does(alone, limits):
    got, want, largest = [], [], []
    for prompt, output in zip(prompts(), run_crowd(alone.loaded, limits), strict=True):
        reported = output.outputs[0].logprobs
        tokens = tuple(entry.token_id for entry in reported)
        scores, tops = alone.score(tuple(prompt), tokens)
        got.append([entry.logprob for entry in reported])
        want.append(scores)
        largest.append(tops)
    # Of the same tokens after the same tokens, whatever was chosen before.
    assert mean_difference(got, want) <= alone.limit
    # The token that the crowd found most likely is so alone, or as good as: two may be off.
    assert mean_difference(largest, want) <= 2 * alone.limit


def test_the_limit_is_far_below_the_effect_of_a_wrong_block(alone):
    wrong = []
    for prompt, tokens in alone.texts:
        other = [(token_id + 1) % 256 for token_id in prompt[:32]]
        wrong.append(alone.score((*other, *prompt[32:]), tokens)[0])
    right = [alone.score(*text)[0] for text in alone.texts]
    # In one prompt of all of them it would be enough.
    assert mean_difference(wrong, right) / len(wrong) > alone.limit
