"""The engine on a model that hashes what it reads through the cache: tokens must be exact."""

import random

import pytest

from quatom.engine.config import EngineConfig
from quatom.engine.engine import Engine
from quatom.engine.llm import LLM
from quatom.engine.sampling import SamplingParams, StructuredOutput
from quatom.errors import EngineError, QueueFullError, RequestError

from .doubles import EOS, byte_tokenizer, expected_tokens, hash_loaded


def make_engine(num_blocks=64, *, tokenizer=None, loaded_options=None, **options):
    defaults = dict(
        max_num_seqs=8,
        max_num_batched_tokens=32,
        block_size=4,
        max_model_len=100,
    )
    config = EngineConfig(**{**defaults, **options, "kv_cache_memory": num_blocks * 4 * 8})
    return Engine(hash_loaded(tokenizer=tokenizer, **(loaded_options or {})), config)


def greedy(count, **options):
    return SamplingParams(temperature=0.0, max_tokens=count, **options)


def random_prompts(count, seed=0, longest=40):
    rng = random.Random(seed)
    return [[rng.randrange(256) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def run(engine, prompts, params):
    outputs = LLM.from_engine(engine).generate(prompts, params)
    engine.check_accounting()
    assert engine.pool.usage == 0.0
    return outputs


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("prefix_caching", [False, True])
@pytest.mark.parametrize("num_blocks", [26, 40, 400])
def test_greedy_tokens_are_exact(overlap, prefix_caching, num_blocks):
    engine = make_engine(num_blocks, overlap=overlap, prefix_caching=prefix_caching)
    prompts = random_prompts(20)
    # Prefixes of one another, with and without whole blocks.
    prompts += [prompts[0][:1] * 3, prompts[0], prompts[0] * 2, [*prompts[0], 5], prompts[0][:4]]
    prompts = [p[:60] for p in prompts] * 2
    lengths = [1 + i % 30 for i in range(len(prompts))]
    outputs = run(engine, prompts, [greedy(n) for n in lengths])
    for output, prompt, length in zip(outputs, prompts, lengths, strict=True):
        assert output.token_ids == expected_tokens(prompt, length)
        assert output.outputs[0].finish_reason == "length"
    if num_blocks == 26:
        assert engine.scheduler.num_preemptions > 0
    if num_blocks == 400:
        assert engine.scheduler.num_preemptions == 0


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("num_blocks", [26, 300])
@pytest.mark.parametrize("prefix_caching", [False, True])
def test_completions_of_one_prompt_share_its_blocks(overlap, num_blocks, prefix_caching):
    engine = make_engine(
        num_blocks, overlap=overlap, prefix_caching=prefix_caching, max_num_seqs=24
    )
    prompts = random_prompts(6, seed=1)
    outputs = run(engine, prompts, greedy(20, n=4))
    for output, prompt in zip(outputs, prompts, strict=True):
        assert [o.token_ids for o in output.outputs] == [expected_tokens(prompt, 20)] * 4
    if num_blocks == 300:
        # 3 of 4 completions run one prompt token each instead of the whole prompt.
        prompt_tokens = sum(len(p) + 3 for p in prompts)
        assert sum(tokens for tokens, _ in engine.runner.model.steps) == prompt_tokens + 6 * 4 * 19


def test_a_known_prefix_is_not_computed_again():
    engine = make_engine(100)
    prompt = list(range(40))
    first = run(engine, [prompt], greedy(4))[0]
    engine.runner.model.steps.clear()
    again = run(engine, [prompt], greedy(4))[0]
    assert (first.num_cached_tokens, again.num_cached_tokens) == (0, 39)
    assert (first.num_cache_write_tokens, again.num_cache_write_tokens) == (40, 0)
    assert again.token_ids == first.token_ids == expected_tokens(prompt, 4)
    # The last prompt token alone runs, into a copy of the shared block.
    assert [tokens for tokens, _ in engine.runner.model.steps] == [1, 1, 1, 1]
    longer = run(engine, [[*prompt, 1, 2, 3]], greedy(4))[0]
    assert longer.num_cached_tokens == 40
    assert longer.token_ids == expected_tokens([*prompt, 1, 2, 3], 4)


def test_a_conversation_reuses_the_answer_too():
    engine = make_engine(100)
    prompt = list(range(30))
    answer = run(engine, [prompt], greedy(18))[0].token_ids
    second = run(engine, [[*prompt, *answer, 7, 8]], greedy(2))[0]
    # All but the last answered token were computed: 47 tokens, 11 whole blocks of 4.
    assert second.num_cached_tokens == 44
    assert second.num_cache_write_tokens == 4  # the twelfth block; the thirteenth is not whole
    assert second.token_ids == expected_tokens([*prompt, *answer, 7, 8], 2)


def test_steps_mix_chunks_of_prompts_with_decodes():
    engine = make_engine(400, max_num_batched_tokens=16, max_num_seqs=8)
    engine.add_request("short", [1, 2, 3], greedy(12))
    engine.step()
    engine.add_request("long", list(range(80)), greedy(3))
    engine.step()
    assert engine.runner.model.steps[-1] == (16, 2)  # one decode and 15 prompt tokens
    engine.add_request("late", [9, 9], greedy(2))
    engine.step()
    # Long gets its chunk of 8 tokens, so the late prompt is not held up.
    assert engine.runner.model.steps[-1] == (1 + 8 + 2, 3)


def test_requests_are_served_in_order_of_arrival():
    engine = make_engine(400, max_num_seqs=2)
    for i in range(6):
        engine.add_request(str(i), [i], greedy(3))
    finished = []
    while engine.has_work:
        finished += [d.request_id for d in engine.step() if d.finish_reason]
    assert finished == [str(i) for i in range(6)]


def test_the_oldest_request_is_never_preempted():
    engine = make_engine(26, max_num_seqs=8, forecast_admission=False)
    for i in range(8):
        engine.add_request(str(i), [i] * 20, greedy(60))
    order = []
    while engine.has_work:
        order += [d.request_id for d in engine.step() if d.finish_reason]
        engine.check_accounting()
    assert order[0] == "0"
    assert sorted(order) == [str(i) for i in range(8)]
    assert engine.scheduler.num_preemptions >= 6


@pytest.mark.parametrize("overlap", [False, True])
def test_a_thousand_random_aborts_lose_no_block(overlap):
    rng = random.Random(7)
    engine = make_engine(60, overlap=overlap, max_num_seqs=8)
    live, aborted, number = {}, 0, 0
    while aborted < 1000:
        while len(live) < 12:
            n = rng.choice([1, 1, 1, 3])
            prompt = [rng.randrange(4) for _ in range(rng.randint(1, 30))]
            engine.add_request(str(number), prompt, greedy(rng.randint(1, 40), n=n))
            live[str(number)] = n
            number += 1
        for delta in engine.step():
            if delta.finish_reason is not None and delta.request_id in live:
                live[delta.request_id] -= 1
                if not live[delta.request_id]:
                    del live[delta.request_id]
        for request_id in rng.sample(sorted(live), min(len(live), rng.randint(0, 4))):
            engine.abort(request_id)
            del live[request_id]
            aborted += 1
            engine.check_accounting()
    for request_id in live:
        engine.abort(request_id)
    while engine.has_work:
        assert not engine.step()
    engine.check_accounting()
    assert engine.pool.num_free == 60


def test_seeded_sampling_does_not_depend_on_the_crowd():
    params = SamplingParams(
        temperature=1.3, top_p=0.9, top_k=40, min_p=0.01, seed=11, max_tokens=30, n=2
    )
    prompt = [1, 2, 3, 4, 5]
    alone = run(make_engine(400), [prompt], params)[0]
    crowd = [SamplingParams(max_tokens=25, temperature=0.8 + 0.1 * i) for i in range(10)]
    engine = make_engine(60)
    together = run(engine, [*random_prompts(10), prompt], [*crowd, params])[-1]
    assert [o.token_ids for o in alone.outputs] == [o.token_ids for o in together.outputs]
    assert alone.outputs[0].token_ids != alone.outputs[1].token_ids
    assert alone.outputs[0].token_ids != expected_tokens(prompt, 30)


@pytest.mark.parametrize("overlap", [False, True])
def test_end_of_sequence_and_stop_tokens_end_a_completion(overlap):
    engine = make_engine(overlap=overlap)
    prompt = [1, 2, 3]
    tokens = expected_tokens(prompt, 10)
    stop = run(engine, [prompt], greedy(10, stop_token_ids=[tokens[4]]))[0].outputs[0]
    assert (stop.token_ids, stop.finish_reason, stop.stop_reason) == (
        tokens[:5],
        "stop",
        tokens[4],
    )
    # A bias of 100 makes the end of sequence the only choice, min_tokens forbids it for a while.
    biased = greedy(10, logit_bias={EOS: 100.0}, min_tokens=3)
    ended = run(engine, [prompt], biased)[0].outputs[0]
    assert ended.token_ids == [*tokens[:3], EOS]
    assert (ended.finish_reason, ended.stop_reason) == ("stop", None)
    ignored = run(engine, [prompt], greedy(4, logit_bias={EOS: 100.0}, ignore_eos=True))[0]
    assert ignored.token_ids == [EOS] * 4


def test_prompt_logprobs_are_those_of_every_prompt_token():
    engine = make_engine(100, max_num_batched_tokens=8)
    prompt = list(range(30))
    params = greedy(3, prompt_logprobs=2, logprobs=3)
    for _ in range(2):  # the second time the prefix is known, and yet every token must run
        output = run(engine, [prompt], params)[0]
        assert [p.token_id for p in output.prompt_logprobs] == prompt[1:]
        assert all(len(p.top) == 2 and p.logprob <= p.top[0][1] for p in output.prompt_logprobs)
        assert [p.token_id for p in output.outputs[0].logprobs] == output.token_ids
        assert all(p.top[0] == (p.token_id, p.logprob) for p in output.outputs[0].logprobs)


def test_hidden_states_are_asked_for_where_a_token_follows():
    engine = make_engine(100, max_num_batched_tokens=16, max_prefill_chunk=8)
    forward, asked = engine.runner.model.forward, []

    def record(input_ids, context, kv_cache, rows=None):
        asked.append((len(input_ids), None if rows is None else rows.tolist()))
        return forward(input_ids, context, kv_cache, rows)

    engine.runner.model.forward = record
    run(engine, [list(range(20)), [1, 2, 3]], greedy(2))
    assert asked == [(11, [10]), (13, [0, 12]), (1, [0])]
    asked.clear()
    run(engine, [list(range(50, 70))], greedy(1))  # its first chunk samples nothing
    assert asked == [(16, []), (4, [3])]
    asked.clear()
    run(engine, [list(range(20)), [1, 2, 3]], greedy(1, prompt_logprobs=0))
    assert all(rows is None for _, rows in asked)


def test_a_row_without_numbers_fails_its_request_alone():
    engine = make_engine(loaded_options={"nan_on": 200})
    outputs = run(engine, [[200], [1, 2]], greedy(5))
    assert outputs[0].outputs[0].finish_reason == "error"
    assert outputs[1].token_ids == expected_tokens([1, 2], 5)


def test_a_failing_step_ends_what_ran_and_nothing_else():
    engine = make_engine(loaded_options={"fail_on": [299]}, max_num_seqs=2)
    engine.add_request("bad", [299], greedy(5))
    engine.add_request("beside", [1], greedy(5))
    engine.add_request("behind", [2], greedy(5))
    with pytest.raises(RuntimeError, match="kernel failed"):
        engine.step()
    failed = engine.fail_running("kernel failed")
    assert [(d.request_id, d.finish_reason, d.error) for d in failed] == [
        ("bad", "error", "kernel failed"),
        ("beside", "error", "kernel failed"),
    ]
    tokens = []
    while engine.has_work:
        tokens += [t for d in engine.step() for t in d.token_ids]
    assert tokens == expected_tokens([2], 5)
    engine.check_accounting()
    assert engine.pool.num_free == engine.pool.num_blocks


def test_text_and_stop_strings():
    tokenizer = byte_tokenizer()
    engine = make_engine(tokenizer=tokenizer)
    prompt = list(b"hello")
    tokens = expected_tokens(prompt, 40)
    output = run(engine, ["hello"], greedy(40))[0]
    assert output.token_ids == tokens
    text = output.text
    readable = next(t for t in (text[i : i + 2] for i in range(5, 40)) if t.isascii())
    for keep in (False, True):
        params = greedy(40, stop=["never", readable], include_stop_str_in_output=keep)
        cut = run(engine, ["hello"], params)[0].outputs[0]
        assert cut.text == text[: text.index(readable) + 2 * keep]
        assert (cut.finish_reason, cut.stop_reason) == ("stop", readable)


def test_errors_name_the_numbers():
    engine = make_engine(max_waiting=1)
    with pytest.raises(RequestError, match=r"prompt has 100 tokens.*limit is 100"):
        engine.add_request("a", [1] * 100, greedy(1))
    with pytest.raises(RequestError, match=r"90 tokens and max_tokens is 11, 101.*lower .* to 10"):
        engine.add_request("a", [1] * 90, greedy(11))
    with pytest.raises(RequestError, match=r"token id 300; the model has 300 tokens, 0 to 299"):
        engine.add_request("a", [300], greedy(1))
    with pytest.raises(RequestError, match="stop strings need a tokenizer"):
        engine.add_request("a", [3], greedy(1, stop="x"))
    with pytest.raises(RequestError, match="structured output needs a tokenizer"):
        engine.add_request("a", [3], greedy(1, structured=StructuredOutput("regex", "a*")))
    engine.add_request("a", [1], greedy(1))
    with pytest.raises(QueueFullError, match=r"1 requests are waiting, the limit is 1"):
        engine.add_request("b", [1], greedy(1))
    with pytest.raises(EngineError, match=r"needs 26 blocks.*raise --kv-cache-memory"):
        make_engine(25)
