"""Logits to tokens: each rule alone by hand, all of them against a plain loop, and the chances."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quatom.engine import sampler
from quatom.engine.outputs import Timestamps
from quatom.engine.sampler import build_inputs, sample, uniform_from_seed
from quatom.engine.sampling import SamplingParams
from quatom.engine.sequence import Sequence
from quatom.engine.token_rules import TokenBias
from quatom.errors import RequestError

CPU = torch.device("cpu")


def make_sequence(params, prompt=(1,), output=(), seed=0):
    return Sequence(
        request_id="r",
        index=0,
        order=(0, 0),
        token_ids=[*prompt, *output],
        num_prompt=len(prompt),
        params=params,
        seed=seed if params.seed is None else params.seed,
        max_total=1000,
        times=Timestamps(arrival=0.0),
        in_flight=1,  # the token that is being sampled
        bias=TokenBias.of(params.logit_bias),
    )


def draw(logits, sequences, eos=()):
    logits = torch.as_tensor(logits, dtype=torch.float32).clone()
    inputs = build_inputs(sequences, logits.shape[1], eos, CPU)
    return sample(logits, inputs)


def support(logits, params, draws=400, **options):
    """Tokens that appear in many draws with different seeds."""
    rows = torch.tensor(logits, dtype=torch.float32).expand(draws, -1)
    sequences = [make_sequence(params, seed=i, **options) for i in range(draws)]
    return set(draw(rows, sequences).token_ids.tolist())


# Probabilities 0.4, 0.3, 0.2, 0.1 in a shuffled order: ids 2, 0, 3, 1.
LOGITS = np.log([0.3, 0.1, 0.4, 0.2]).tolist()


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({}, {0, 1, 2, 3}),
        ({"top_k": 1}, {2}),
        ({"top_k": 2}, {2, 0}),
        ({"top_k": -1}, {0, 1, 2, 3}),
        ({"top_k": 1000}, {0, 1, 2, 3}),
        ({"top_p": 0.39}, {2}),
        ({"top_p": 0.41}, {2, 0}),
        ({"top_p": 0.89}, {2, 0, 3}),
        ({"top_p": 1e-9}, {2}),
        ({"top_p": 0.0}, {2}),
        ({"top_p": 0, "temperature": 50.0}, {2}),
        ({"min_p": 0.51}, {2, 0}),
        ({"min_p": 1.0}, {2}),
        ({"top_k": 3, "top_p": 0.7}, {2, 0}),  # 0.4 + 0.3 of a remaining 0.9 is 0.78
        ({"top_k": 3, "top_p": 0.8}, {2, 0, 3}),
        ({"temperature": 0.01}, {2}),
        ({"logit_bias": {1: 100.0}}, {1}),
        ({"logit_bias": {2: -100.0}}, {0, 1, 3}),
    ],
)
def test_what_may_be_sampled(options, allowed):
    assert support(LOGITS, SamplingParams(**options)) == allowed


@pytest.mark.parametrize("floor", [sampler._histogram_floor, sampler._bisected_floor])
def test_tokens_of_equal_probability_stay_together(floor):
    probs = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.1, 0.4, 0.4, 0.1]])
    top_p = torch.tensor([[0.3], [0.5]])
    assert torch.equal(floor(probs, top_p), torch.tensor([[0.25], [0.4]]))


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**16),
    scale=st.floats(0.1, 8.0),
    top_p=st.one_of(st.just(0.0), st.floats(0.01, 1.0)),
)
def test_the_nucleus_is_the_smallest_that_reaches_top_p(seed, scale, top_p):
    generator = torch.Generator().manual_seed(seed)
    probs = (scale * torch.randn(3, 3000, generator=generator)).softmax(-1)
    for floor in (sampler._histogram_floor, sampler._bisected_floor):
        least = floor(probs, torch.full((3, 1), top_p))
        mass = (probs * (probs >= least)).sum(-1, dtype=torch.float64)
        kept = torch.where(probs >= least, probs, torch.inf).amin(-1, keepdim=True)
        # Tokens of equal probability stay together: two of 3000 often are equal.
        without = (probs * (probs > kept)).sum(-1, dtype=torch.float64)
        # Sums of 3000 float32 numbers are exact to 3000 * 2**-24 = 1.8e-4 at worst.
        assert (mass >= top_p - 2e-4).all()
        assert (without <= top_p + 2e-4).all()


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**16),
    top_p=st.one_of(st.just(0.0), st.floats(2.0**-20, 1.0, width=32)),
    kinds=st.lists(st.sampled_from(["flat", "peaked", "equal", "zeros"]), min_size=1, max_size=4),
)
def test_the_nucleus_on_a_cpu_is_that_of_a_sort(seed, top_p, kinds):
    generator = torch.Generator().manual_seed(seed)
    rows = {
        "flat": torch.randn(997, generator=generator).softmax(-1),
        "peaked": (40 * torch.randn(997, generator=generator)).softmax(-1),
        "equal": torch.full((997,), 2.0**-10),
        "zeros": torch.randint(0, 3, (997,), generator=generator).float() / 1024,
    }
    probs = torch.stack([rows[kind] for kind in kinds])
    got = sampler._histogram_floor(probs, torch.full((len(kinds), 1), top_p))
    for row, floor in zip(probs.double(), got.double(), strict=True):
        mass = row[row >= floor].sum()
        more = row[row > floor].sum()
        # float64 sums of 997 numbers; equality may fall to either side of their rounding.
        slack = 1e-12 * row.sum()
        assert mass >= top_p * row.sum() - slack
        assert more < top_p * row.sum() + slack
        assert floor in row


def test_frequencies_follow_the_probabilities():
    draws = 20_000
    sequences = [make_sequence(SamplingParams(), seed=i) for i in range(draws)]
    tokens = draw(torch.tensor(LOGITS).expand(draws, -1), sequences).token_ids
    frequencies = torch.bincount(tokens, minlength=4) / draws
    # Standard deviation sqrt(0.4 * 0.6 / 20000) = 0.0035; four of them.
    torch.testing.assert_close(frequencies, torch.tensor([0.3, 0.1, 0.4, 0.2]), atol=0.014, rtol=0)


def test_uniforms_are_even_and_below_one():
    u = uniform_from_seed(np.arange(100_000, dtype=np.uint64), np.ones(100_000, dtype=np.uint64))
    assert u.min() >= 0.0
    assert u.max() < 1.0
    counts = np.histogram(u, bins=50, range=(0, 1))[0]
    assert abs(counts - 2000).max() < 5 * 2000**0.5
    steps = uniform_from_seed(np.full(1000, 7, dtype=np.uint64), np.arange(1000, dtype=np.uint64))
    assert len(np.unique(steps)) == 1000
    assert abs(np.corrcoef(steps[1:], steps[:-1])[0, 1]) < 0.1


def test_rows_do_not_see_each_other():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(12, 500, generator=generator)
    kinds = [
        SamplingParams(temperature=0.0),
        SamplingParams(seed=1),
        SamplingParams(seed=2, top_k=5, top_p=0.9),
        SamplingParams(seed=3, min_p=0.1, logprobs=3),
        SamplingParams(seed=4, repetition_penalty=1.5, presence_penalty=1.0),
        SamplingParams(seed=5, logit_bias={3: 5.0}, min_tokens=4, logprobs=0),
    ]
    sequences = [make_sequence(kinds[i % 6], output=range(i)) for i in range(12)]
    together = draw(logits, sequences, eos=(7,))
    for row, sequence in enumerate(sequences):
        alone = draw(logits[row : row + 1], [sequence], eos=(7,))
        assert alone.token_ids[0] == together.token_ids[row]
        if sequence.params.logprobs is not None:
            assert alone.logprobs[0] == together.logprobs[row]


def test_penalties_by_hand():
    logits = [[2.0, -2.0, 1.0, 1.0, 1.0]]
    params = SamplingParams(
        temperature=0.0, repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25
    )
    sequence = make_sequence(params, prompt=(0, 2), output=(1, 3, 3))
    changed = torch.tensor(logits)
    sample(changed, build_inputs([sequence], 5, (), CPU))
    # 0 and 2 are in the prompt: halved. 1 is in the output once: doubled, then 0.75 less.
    # 3 is there twice: halved, then 0.5 + 2 * 0.25 less. 4 was never seen.
    assert changed.tolist() == [[1.0, -4.75, 0.5, -0.5, 1.0]]


def test_min_tokens_bans_every_way_to_stop():
    params = SamplingParams(temperature=0.0, min_tokens=2, stop_token_ids=[1])
    logits = [[5.0, 4.0, 3.0]]
    for output, token in [((), 2), ((9,), 2), ((9, 9), 0)]:
        assert draw(logits, [make_sequence(params, output=output)], eos=(0,)).token_ids == token


def test_logprobs_are_the_models_own():
    params = SamplingParams(temperature=0.5, top_k=1, logit_bias={1: 50.0}, logprobs=2)
    drawn = draw([LOGITS], [make_sequence(params)])
    assert drawn.token_ids.tolist() == [1]
    torch.testing.assert_close(drawn.logprobs.exp(), torch.tensor([0.1]))
    values, ids = drawn.top_logprobs
    assert ids.tolist() == [[2, 0]]
    torch.testing.assert_close(values.exp(), torch.tensor([[0.4, 0.3]]))


def test_rows_without_numbers_are_reported():
    logits = torch.zeros(3, 4)
    logits[1, 2] = torch.nan
    params = [SamplingParams(temperature=0.0), SamplingParams(), SamplingParams(top_p=0.5)]
    drawn = draw(logits, [make_sequence(p) for p in params])
    assert drawn.valid.tolist() == [True, False, True]
    assert ((drawn.token_ids >= 0) & (drawn.token_ids < 4)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": 0.0, "logprobs": 2},
        {"temperature": 0.0, "logit_bias": {3: 0.001}},  # less than a step of 16 bits
        {"temperature": 0.0, "repetition_penalty": 1.001},
        {"temperature": 0.0, "min_tokens": 1},
        {"top_p": 0.9},
    ],
    ids=str,
)
def test_logits_of_16_bits_are_those_numbers_in_float32(options, dtype):
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(3)).mul_(4).to(dtype)
    logits[:, 3] = logits.amax(1)  # twice the largest: the lower id, or the one with more
    sequences = [make_sequence(SamplingParams(**options), prompt=(3,), seed=i) for i in range(4)]
    inputs = build_inputs(sequences, 50, (7,), CPU)
    assert inputs.largest_alone == (options == {"temperature": 0.0})
    got, want = sample(logits.clone(), inputs), sample(logits.float(), inputs)
    assert torch.equal(got.token_ids, want.token_ids)
    assert torch.equal(got.valid, want.valid)
    assert got.logprobs is want.logprobs is None or torch.equal(got.logprobs, want.logprobs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": float("nan")}, r"temperature must be in \[0, 100\], got nan"),
        ({"temperature": "1"}, "temperature must be a number, got '1'"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": -0.1}, r"top_p must be in \[0, 1\], got -0.1"),
        ({"top_k": -2}, "top_k must be at least -1, got -2"),
        ({"top_k": 1.5}, "top_k must be an integer"),
        ({"min_p": 1.1}, "min_p"),
        ({"n": 0}, "n must be from 1 to 128, got 0"),
        ({"max_tokens": -1}, "max_tokens must be at least 0"),
        ({"max_tokens": 0, "min_tokens": 1}, "min_tokens 1 is larger than max_tokens 0"),
        ({"min_tokens": 17}, "min_tokens 17 is larger than max_tokens 16"),
        ({"logprobs": 21}, "logprobs must be from 0 to 20, got 21"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"presence_penalty": 3}, r"presence_penalty must be in \[-2, 2\], got 3"),
        ({"stop": [""]}, r"stop\[0\] must have 1 to 1000 characters, got 0"),
        ({"stop": ["a"], "detokenize": False}, "stop strings need detokenize"),
        ({"stop": ["a", "b" * 1001]}, r"stop\[1\] must have 1 to 1000 characters, got 1001"),
        ({"stop_token_ids": range(129)}, "stop_token_ids must have at most 128 items, got 129"),
        ({"logit_bias": {-1: 1.0}}, "a key of logit_bias must be at least 0, got -1"),
        ({"logit_bias": {1: 101.0}}, r"logit_bias\[1\] must be in \[-100, 100\], got 101.0"),
        ({"seed": 2**64}, "seed"),
    ],
)
def test_parameters_are_checked(options, message):
    with pytest.raises(RequestError, match=message):
        SamplingParams(**options)


def test_parameters_do_not_change_afterwards():
    stop, bias = ["a"], {1: 1.0}
    params = SamplingParams(stop=stop, logit_bias=bias)
    stop.append("b")
    bias[2] = 2.0
    assert params.stop == ("a",)
    assert dict(params.logit_bias) == {1: 1.0}
    assert SamplingParams(stop="abc").stop == ("abc",)
