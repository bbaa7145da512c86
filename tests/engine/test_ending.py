"""Where a completion ends is its own affair: steps that overlap and neighbours change nothing."""

import random
from itertools import count

import pytest

from quatom.engine.sampling import SamplingParams
from quatom.errors import RequestError

from .doubles import EOS, byte_tokenizer, expected_tokens
from .test_engine import greedy, make_engine, random_prompts, run

TOKENIZER = byte_tokenizer()
PROMPT = list(b"hello")
TOKENS = expected_tokens(PROMPT, 60)
STOPS = sorted({chr(t) for t in TOKENS if 32 <= t < 127})[:12]


def first_stop(min_tokens):
    """Tokens until one after the first min_tokens is a stop string."""
    return next(n for n in count(min_tokens + 1) if chr(TOKENS[n - 1]) in STOPS)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("crowd", [0, 12])
def test_min_tokens_counts_tokens_that_are_there(overlap, crowd):
    engine = make_engine(400, tokenizer=TOKENIZER, overlap=overlap, max_num_seqs=16)
    for min_tokens in range(0, 30, 6 if crowd else 2):
        params = greedy(60, stop=STOPS, min_tokens=min_tokens)
        others = [greedy(1 + 3 * i, seed=i) for i in range(crowd)]
        output = run(engine, [*random_prompts(crowd, min_tokens), PROMPT], [*others, params])[-1]
        assert output.token_ids == TOKENS[: first_stop(min_tokens)]
        completion = output.outputs[0]
        assert completion.finish_reason == "stop"
        assert completion.stop_reason == chr(output.token_ids[-1])
        assert completion.text == TOKENIZER.decode(output.token_ids[:-1])


@pytest.mark.parametrize("overlap", [False, True])
def test_a_stop_string_may_begin_before_min_tokens(overlap):
    at = next(i for i in count(1) if all(32 <= t < 127 for t in TOKENS[i : i + 2]))
    stop = bytes(TOKENS[at : at + 2]).decode()
    engine = make_engine(400, tokenizer=TOKENIZER, overlap=overlap)
    for min_tokens in (at + 1, at, 0):
        output = run(engine, [PROMPT], greedy(60, stop=stop, min_tokens=min_tokens))[0]
        assert output.token_ids == TOKENS[: at + 2]
        assert output.text == TOKENIZER.decode(TOKENS[:at])
    beyond = run(engine, [PROMPT], greedy(at + 5, stop=stop, min_tokens=at + 2))[0]
    assert beyond.token_ids == TOKENS[: at + 5]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_a_stop_string_of_one_special_token(overlap, skip):
    engine = make_engine(400, tokenizer=TOKENIZER, overlap=overlap)
    # 258 is <user>: a bias of 100 makes it the only choice.
    params = greedy(10, stop="<user>", logit_bias={258: 100.0}, skip_special_tokens=skip)
    completion = run(engine, [PROMPT], params)[0].outputs[0]
    assert (completion.token_ids, completion.text) == ([258], "")
    assert (completion.finish_reason, completion.stop_reason) == ("stop", "<user>")
    # The end of sequence ends by itself, unless it is ignored.
    params = dict(stop="<eos>", logit_bias={EOS: 100.0}, skip_special_tokens=skip)
    ended = run(engine, [PROMPT], greedy(10, **params))[0].outputs[0]
    assert (ended.token_ids, ended.finish_reason, ended.stop_reason) == ([EOS], "stop", None)
    found = run(engine, [PROMPT], greedy(10, ignore_eos=True, min_tokens=3, **params))[0].outputs[0]
    assert (found.token_ids, found.stop_reason) == ([*TOKENS[:3], EOS], "<eos>")


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_a_prompt_can_be_scored_without_generating(overlap, n):
    engine = make_engine(100, tokenizer=TOKENIZER, overlap=overlap, max_num_batched_tokens=17)
    rng = random.Random(3)
    lengths = [1, 2, 8, 17, 18, 35, 100]  # 100 is the model's length
    prompts = [[rng.randrange(256) for _ in range(length)] for length in lengths]
    scored = run(engine, prompts, SamplingParams(max_tokens=0, prompt_logprobs=2, n=n))
    for prompt, output in zip(prompts, scored, strict=True):
        assert [p.token_id for p in output.prompt_logprobs] == prompt[1:]
        for completion in output.outputs:
            assert (completion.token_ids, completion.text) == ([], "")
            assert completion.finish_reason == "length"
        if len(prompt) < 100:
            more = run(engine, [prompt], greedy(1, prompt_logprobs=2, n=n))[0]
            assert more.prompt_logprobs == output.prompt_logprobs
            assert more.token_ids == expected_tokens(prompt, 1)
    with pytest.raises(RequestError, match="the prompt has 101 tokens; this model's limit is 100"):
        engine.make_request("long", [1] * 101, SamplingParams(max_tokens=0))
    with pytest.raises(RequestError, match="the prompt has 100 tokens; this model's limit is 100"):
        engine.make_request("full", [1] * 100, SamplingParams(max_tokens=None))
