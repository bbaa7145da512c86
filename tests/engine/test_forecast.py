"""Admission by forecast: the arithmetic, and what it saves."""

import pytest

from quatom.engine.config import EngineConfig
from quatom.engine.engine import Engine
from quatom.engine.forecast import PRIOR_OUTPUT, DemandForecast
from quatom.engine.outputs import Timestamps
from quatom.engine.sampling import SamplingParams
from quatom.engine.sequence import Sequence

from .doubles import expected_tokens, hash_loaded


def make_sequence(prompt, total, generated=0, *, ignore_eos=True, cached=0):
    sequence = Sequence(
        request_id="r",
        index=0,
        order=(0, 0),
        token_ids=[0] * (prompt + generated),
        num_prompt=prompt,
        params=SamplingParams(max_tokens=total - prompt, ignore_eos=ignore_eos),
        seed=0,
        max_total=total,
        times=Timestamps(arrival=0.0),
    )
    sequence.num_cached = cached
    return sequence


def simulate(sequences, used):
    """Tokens held at most, by playing every step."""
    rest = [s.max_total - s.num_tokens for s in sequences]
    held = [s.num_tokens - s.num_cached for s in sequences]
    peak = used
    while any(rest):
        used += sum(r > 0 for r in rest)
        peak = max(peak, used)
        for i, r in enumerate(rest):
            if r > 0:
                rest[i], held[i] = r - 1, held[i] + 1
                if rest[i] == 0:
                    used -= held[i]
    return peak


@pytest.mark.parametrize(
    "lengths",
    [
        [(10, 20, 0)],
        [(10, 20, 5), (10, 20, 0), (3, 50, 1)],
        [(100, 101, 0), (5, 105, 0), (50, 80, 29), (7, 9, 1), (7, 9, 1)],
    ],
)
def test_the_peak_is_that_of_a_simulation(lengths):
    sequences = [make_sequence(*numbers) for numbers in lengths]
    used = sum(s.num_tokens for s in sequences)
    assert DemandForecast(1).peak_blocks(sequences, used) == simulate(sequences, used)


def test_a_shared_prefix_is_not_freed_with_one_of_its_users():
    sequences = [make_sequence(40, 44, cached=32), make_sequence(40, 90, cached=32)]
    used = 32 + 2 * 8
    assert DemandForecast(1).peak_blocks(sequences, used) == simulate(sequences, used)
    assert simulate(sequences, used) == max(used + 8, used + 8 - 12 + 46)


def test_an_open_end_is_expected_at_the_mean():
    forecast = DemandForecast(32)
    assert forecast.expected_rest(make_sequence(10, 5000, ignore_eos=False)) == PRIOR_OUTPUT
    assert forecast.expected_rest(make_sequence(10, 30, ignore_eos=False)) == 20
    assert forecast.expected_rest(make_sequence(10, 5000)) == 4990
    for generated in (10, 30):
        forecast.observe(make_sequence(5, 100, generated, ignore_eos=False))
    forecast.observe(make_sequence(5, 100, 95))  # could not have ended earlier
    fresh = make_sequence(10, 5000, ignore_eos=False)
    assert forecast.expected_rest(fresh) == 20
    outlived = make_sequence(10, 5000, 300, ignore_eos=False)
    assert forecast.expected_rest(outlived) == 10


@pytest.mark.parametrize("ignore_eos", [True, False])
def test_room_that_will_be_needed_is_not_given_away(ignore_eos):
    loaded = hash_loaded()
    block_bytes = sum(p.bytes_per_block for p in loaded.model.allocate_kv_cache(1, 16))

    def run(forecast_admission):
        engine = Engine(
            loaded,
            EngineConfig(
                max_num_seqs=8,
                max_model_len=96,
                block_size=16,
                kv_cache_memory=20 * block_bytes,
                prefix_caching=False,
                forecast_admission=forecast_admission,
            ),
        )
        params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=ignore_eos)
        tokens = {str(i): [] for i in range(8)}
        for i in range(8):
            engine.add_request(str(i), [5 + i] * 40, params)
        while engine.has_work:
            for delta in engine.step():
                tokens[delta.request_id] += delta.token_ids
        engine.check_accounting()
        return tokens, engine.scheduler.num_preemptions

    eager, preemptions = run(False)
    planned, none = run(True)
    assert planned == eager
    assert planned == {str(i): expected_tokens([5 + i] * 40, 40) for i in range(8)}
    assert preemptions > 0
    assert none == 0
