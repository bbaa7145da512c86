"""bad_words and logit_bias: what they do to single tokens, and how much of them is accepted."""

import time

import numpy as np
import pytest
import torch

from quatom.engine.config import EngineConfig
from quatom.engine.engine import Engine
from quatom.engine.sampler import build_inputs
from quatom.engine.sampling import MAX_LOGIT_BIAS, SamplingParams, StructuredOutput
from quatom.engine.token_rules import BadWords, TokenBias, gather_bias
from quatom.errors import RequestError
from tests.engine.doubles import VOCAB, byte_tokenizer, hash_loaded


def make_engine(overlap=False):
    config = EngineConfig(
        max_num_seqs=32,
        max_num_batched_tokens=128,
        block_size=16,
        kv_cache_memory=500 * 16 * 8,
        overlap=overlap,
    )
    return Engine(hash_loaded(tokenizer=byte_tokenizer()), config)


def run(engine, params, prompt=(1, 2, 3)):
    engine.add_request("r", list(prompt), params)
    tokens = []
    while engine.has_work:
        tokens += [t for delta in engine.step() for t in delta.token_ids]
    return tokens


def contains(tokens, word):
    return any(tokens[i : i + len(word)] == word for i in range(len(tokens)))


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("length", [1, 2, 3])
def test_bad_words_are_never_generated(length, overlap):
    free = run(make_engine(), SamplingParams(temperature=0.0, max_tokens=60))
    ends = [i for i in range(5, 60) if all(32 < t < 127 for t in free[i - length + 1 : i + 1])]
    words = [bytes(free[i - length + 1 : i + 1]).decode() for i in ends[:3]]
    assert words
    params = SamplingParams(temperature=0.0, max_tokens=60, bad_words=words)
    held = run(make_engine(overlap), params)
    assert not any(contains(held, list(word.encode())) for word in words)
    text = bytes(token if token < 128 else 0 for token in free)
    same = min(text.index(word.encode()) for word in words) + length - 1
    assert held[:same] == free[:same]  # nothing else is forbidden


def test_a_prompt_may_end_with_half_of_a_bad_word():
    words = BadWords([(1, 2), (3,), (4, 5, 6)])
    assert words.banned([9, 1], 2) == {3}
    assert words.banned([9, 1], 1) == {2, 3}
    assert words.banned([4, 5], 0) == {6, 3}
    assert words.banned([4, 5], 1) == {3}
    assert words.banned([], 0) == {3}


class Merging:
    """A tokenizer that knows some words with the space or line before them."""

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        known = {"": [], " ": [1], "\n": [2], "bad": [10], " bad": [11], "\nbad": [2, 10]}
        return known[text]


def test_words_are_found_with_and_without_a_space():
    assert BadWords.of(["bad"], Merging()).banned([], 0) == {10, 11}
    assert BadWords.of([], None) is None
    with pytest.raises(RequestError, match="need a tokenizer"):
        BadWords.of(["bad"], None)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([""], r"bad_words\[0\] must have 1 to 200 characters, got 0"),
        (["x" * 201], "1 to 200 characters, got 201"),
        ([1], r"bad_words\[0\] must be a string, got 1"),
        (["x"] * 129, "bad_words must have at most 128 items, got 129"),
    ],
)
def test_bad_bad_words(words, reason):
    with pytest.raises(RequestError, match=reason):
        SamplingParams(bad_words=words)


def test_a_constraint_excludes_bad_words():
    with pytest.raises(RequestError, match="bad_words and structured output"):
        SamplingParams(bad_words=["a"], structured=StructuredOutput("regex", "a"))


def test_biases_have_a_limit():
    SamplingParams(logit_bias=dict.fromkeys(range(MAX_LOGIT_BIAS), 1.0))
    with pytest.raises(RequestError, match="logit_bias must have at most 300 items, got 301"):
        SamplingParams(logit_bias=dict.fromkeys(range(MAX_LOGIT_BIAS + 1), 1.0))


def test_biases_of_all_rows():
    assert gather_bias([None, None]) is None
    where, values = gather_bias([TokenBias.of({3: 1.5, 1: -2.0}), None, TokenBias.of({7: 4.0})])
    assert where.tolist() == [[0, 0, 2], [3, 1, 7]]
    assert values.tolist() == [1.5, -2.0, 4.0]
    assert TokenBias.of({}) is None


def test_completions_share_one_bias_and_a_step_is_cheap():
    engine = make_engine()
    bias = {i: float(i % 3) for i in range(VOCAB)}
    params = SamplingParams(n=128, max_tokens=2, logit_bias=bias)
    sequences = engine.make_request("r", [1], params).sequences
    assert len({id(s.bias) for s in sequences}) == 1
    for sequence in sequences:
        sequence.in_flight = 1
    started = time.thread_time()
    inputs = build_inputs(sequences, VOCAB, (), torch.device("cpu"))
    # 2 ms where this was written; one Python object for each entry and row took 30.
    assert time.thread_time() - started < 0.02
    where, values = inputs.bias
    assert where.shape == (2, 128 * VOCAB)
    assert np.array_equal(where[0].numpy(), np.repeat(np.arange(128), VOCAB))
    assert values.dtype == torch.float32
