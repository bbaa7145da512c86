"""The engine on a GPU: graphs change nothing, runs repeat, blocks run out and come back."""

import pytest
import torch

from quatom.benchmark.random_weights import random_model
from quatom.engine.config import EngineConfig
from quatom.engine.engine import Engine
from quatom.engine.sampling import SamplingParams
from quatom.loading import load
from quatom.presets import PRESETS
from tests.families.models import save_tiny

pytestmark = pytest.mark.gpu

PROMPTS = [[(7 * i * j + i) % 500 + 1 for j in range(3 + 29 * i)] for i in range(8)]
DEVICE = "cuda"
RECIPES = ["fp16", "w8a8", "w4a16", "atom-w4a4kv4", "quatom-w4a4kv4", "quatom-w4a8kv4"]


def make_engine(recipe="quatom-w4a4kv4", *, shape="tiny", **options):
    loaded = random_model(shape, PRESETS[recipe], device=DEVICE)
    given = dict(max_num_seqs=8, max_num_batched_tokens=128, kv_cache_memory=2**23)
    return Engine(loaded, EngineConfig(**{**given, **options}))


def difference(runs, others):
    """Which prompts got other tokens in the second runs, and from which token on."""
    lines = []
    for prompt, one, other in zip(PROMPTS, runs, others, strict=True):
        if one != other:
            at = next(i for i in range(len(one)) if one[: i + 1] != other[: i + 1])
            lines.append(f"prompt of {len(prompt)}, token {at}: {one[at:]} and {other[at:]}")
    return "\n".join(lines)


def generate(engine, prompts=PROMPTS, **params):
    wanted = SamplingParams(**{**dict(temperature=0.0, max_tokens=24, ignore_eos=True), **params})
    tokens = {}
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, wanted)
        tokens[str(i)] = []
    while engine.has_work:
        for delta in engine.step():
            place = f"prompt {delta.request_id}, token {len(tokens[delta.request_id])}"
            assert delta.error is None, place
            tokens[delta.request_id] += delta.token_ids
    engine.check_accounting()
    return list(tokens.values())


def one_by_one(engine):
    return [generate(engine, [prompt])[0] for prompt in PROMPTS]


@pytest.mark.parametrize("recipe", RECIPES)
def test_graphs_and_overlap_change_no_token_and_runs_repeat(recipe):
    # One prompt at a time: the same batches, so the same products. Attention over less than 512
    # tokens is never split, so graphs, which must assume the longest, add in the same order.
    # Prompts run without graphs: padding one changes which kernel of cuBLAS multiplies it.
    options = dict(prefix_caching=False, max_model_len=256)
    engine = make_engine(recipe, prefill_graph_tokens=0, **options)
    assert engine.runner.decode_graphs is not None
    graphs, again = one_by_one(engine), one_by_one(engine)
    assert not difference(graphs, again), "graphs do not repeat"
    eager = make_engine(recipe, cuda_graphs=False, overlap=False, **options)
    alone, repeated = one_by_one(eager), one_by_one(eager)
    assert not difference(alone, repeated), "runs without graphs do not repeat"
    assert not difference(graphs, alone), "graphs and runs without them differ"
    assert len({tuple(tokens) for tokens in graphs}) == len(PROMPTS)


def test_graphs_grow_queries_with_their_position(tmp_path):
    """Ministral 3 in 16 bits: a factor from a table of positions, which graphs read as they run."""
    folder = save_tiny(tmp_path / "model", "ministral3")
    prompts = [[token % 256 for token in prompt] for prompt in PROMPTS[:4]]
    found = []
    for graphs in (True, False):
        loaded = load(folder, device=DEVICE, dtype=torch.bfloat16)
        options = dict(cuda_graphs=graphs, prefill_graph_tokens=0, prefix_caching=False)
        config = EngineConfig(max_num_seqs=1, max_model_len=256, kv_cache_memory=2**23, **options)
        engine = Engine(loaded, config)
        assert loaded.model.rotary.query_scales(0) is not None
        assert (engine.runner.decode_graphs is not None) == graphs
        found.append([generate(engine, [prompt])[0] for prompt in prompts])
    assert found[0] == found[1]


def spy_on_prefills(engine):
    """Tokens of the steps that the prefill graphs of an engine replay."""
    replayed, replay = [], engine.runner.prefill_graphs.replay

    def record(input_ids, batch, rows):
        replayed.append(input_ids.shape[0])
        return replay(input_ids, batch, rows)

    engine.runner.prefill_graphs.replay = record
    return replayed


@pytest.mark.parametrize("shape", ["tiny", "tiny-moe"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_prefill_graphs_change_no_token(shape, recipe):
    # Prompts that are as long as a size class: the same rows in the same products.
    lengths = (64, 96, 128, 192)
    prompts = [[(7 * n * j + n) % 500 + 1 for j in range(n)] for n in lengths]
    options = dict(prefix_caching=False, max_num_batched_tokens=192, max_model_len=256)
    engine = make_engine(recipe, shape=shape, **options)
    replayed = spy_on_prefills(engine)
    graphs = [generate(engine, [prompt])[0] for prompt in prompts]
    assert tuple(replayed) == lengths
    eager = make_engine(recipe, shape=shape, prefill_graph_tokens=0, **options)
    assert eager.runner.prefill_graphs is None
    assert graphs == [generate(eager, [prompt])[0] for prompt in prompts]
    assert len({tuple(tokens) for tokens in graphs}) == len(prompts)


def test_padded_and_mixed_prefill_graphs_change_no_token_of_integer_products():
    # A row of an integer product is the same whatever rows are beside it, so padding changes
    # nothing; the head is a product of cuBLAS, but of as many rows with and without graphs.
    options = dict(prefix_caching=False, max_model_len=256)
    engine = make_engine("quatom-w4a4kv4", **options)
    replayed = spy_on_prefills(engine)
    mixed = generate(engine)
    assert any(tokens not in (64, 96, 128) for tokens in replayed)
    assert mixed == generate(make_engine("quatom-w4a4kv4", prefill_graph_tokens=0, **options))


@pytest.mark.parametrize("shape", ["tiny", "tiny-moe"])
def test_prefill_graphs_give_the_rows_that_are_wanted(shape):
    """What follows the last attention for some rows, as for all of them: integer products."""
    options = dict(max_num_seqs=5, prefix_caching=False, max_model_len=256, cuda_graphs=True)
    engine = make_engine("quatom-w4a8kv4", shape=shape, **options)
    graphs, compared = engine.runner.prefill_graphs, []
    replay = graphs.replay

    def both(input_ids, batch, rows):
        everything = replay(input_ids, batch, None).clone()
        wanted = replay(input_ids, batch, rows)
        assert everything.shape[0] == input_ids.shape[0]
        assert torch.equal(wanted, everything[rows])
        compared.append(rows.shape[0])
        return wanted

    graphs.replay = both
    generate(engine, PROMPTS[-1:])  # its first chunk samples nothing
    generate(engine)  # 3 rows are padded to 4, and 5 are a class of their own
    assert {0, 1} < set(compared) <= set(range(6))


def test_prompt_logprobs_beside_other_prompts():
    """Every token's hidden state is wanted in such a step, which the graphs replay all the same."""
    found = []
    for options in (dict(), dict(cuda_graphs=False)):
        engine = make_engine("fp16", prefix_caching=False, max_model_len=256, **options)
        scored = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, prompt_logprobs=1)
        engine.add_request("scored", PROMPTS[5], scored)
        for i, prompt in enumerate(PROMPTS[:4]):
            engine.add_request(str(i), prompt, SamplingParams(temperature=0.0, max_tokens=4))
        entries = None
        while engine.has_work:
            for delta in engine.step():
                assert delta.error is None
                if delta.request_id == "scored":
                    entries = entries or delta.prompt_logprobs
        assert [entry.token_id for entry in entries] == PROMPTS[5][1:]
        found.append([entry.logprob for entry in entries])
    # Padding changes which kernel of cuBLAS multiplies, and so the last of 11 bits of a number;
    # logits of order 1 differ by some of their units of 2**-10.
    assert found[0] == pytest.approx(found[1], abs=0.02)


def test_a_batch_repeats_and_samples_by_seed():
    engine = make_engine(prefix_caching=False)
    assert generate(engine) == generate(engine)
    chance = dict(temperature=1.0, top_p=0.9, top_k=40, min_p=0.01, seed=5)
    first = generate(engine, **chance)
    assert first == generate(engine, **chance)
    assert first != generate(engine, **{**chance, "seed": 6})


def test_blocks_run_out_and_every_request_finishes():
    options = dict(kv_cache_memory=2**17 + 2**15, max_model_len=256)
    engine = make_engine(forecast_admission=False, **options)
    tokens = generate(engine)
    assert all(len(row) == 24 for row in tokens)
    assert engine.scheduler.num_preemptions > 0


def test_known_prefixes_are_used():
    engine = make_engine()
    generate(engine)
    before = engine.scheduler.prefix_hits
    generate(engine)
    assert engine.scheduler.prefix_hits > before


@pytest.mark.usefixtures("whole_gpu")
def test_measured_memory_makes_a_cache():
    engine = make_engine(kv_cache_memory=None, memory_fraction=0.3)
    generate(engine)
    assert engine.kv_cache_bytes > 2**30


def test_logprobs_and_penalties_run_on_the_device():
    engine = make_engine(prefix_caching=False)
    plain = generate(engine, logprobs=3)
    assert plain == generate(engine)
    assert generate(engine, frequency_penalty=2.0, repetition_penalty=1.5) != plain


def test_the_reference_generates_on_a_gpu(monkeypatch):
    monkeypatch.setenv("QUATOM_BACKEND", "reference")
    engine = make_engine(prefix_caching=False)
    assert engine.runner.decode_graphs is engine.runner.prefill_graphs is None
    tokens = generate(engine)
    assert tokens == generate(engine)
    assert all(len(row) == 24 for row in tokens)
