"""Lengths, prompts and arrivals of a workload."""

import json

import numpy as np
import pytest

from quatom.benchmark.workloads import (
    fixed_lengths,
    poisson_arrivals,
    random_prompts,
    read_conversations,
)
from quatom.errors import RequestError


def test_fixed_lengths():
    workload = fixed_lengths(3, 10, 4)
    assert workload.lengths == ((10, 4),) * 3
    assert (workload.input_tokens, workload.output_tokens, workload.longest) == (30, 12, 14)
    assert workload.describe() == {
        "workload": "10+4",
        "requests": 3,
        "input_tokens": 10,
        "output_tokens": 4,
    }
    with pytest.raises(RequestError, match="got 0 of 10"):
        fixed_lengths(0, 10, 4)


def test_conversations(tmp_path):
    path = tmp_path / "talks.json"
    path.write_text(json.dumps([[5, 6], [7, 8], [100, 1], [9, 2], [0, 3]]))
    workload = read_conversations(path, 3, longest=100, seed=1)
    assert sorted(workload.lengths) == [(5, 6), (7, 8), (9, 2)]
    assert workload.describe() == {
        "workload": "talks",
        "requests": 3,
        "input_tokens": 7,
        "output_tokens": 5.3,
    }
    orders = {read_conversations(path, 3, longest=100, seed=s).lengths for s in range(8)}
    assert len(orders) > 1
    assert read_conversations(path, 3, longest=100, seed=1) == workload
    with pytest.raises(RequestError, match="has 3 conversations of at most 100 tokens, 4 were"):
        read_conversations(path, 4, longest=100)
    path.write_text(json.dumps({"a": 1}))
    with pytest.raises(RequestError, match="must hold a JSON list"):
        read_conversations(path, 1, longest=100)
    with pytest.raises(RequestError, match="cannot read conversations"):
        read_conversations(tmp_path / "absent.json", 1, longest=100)


def test_prompts_share_no_prefix_and_follow_the_seed():
    workload = fixed_lengths(50, 40, 1)
    prompts = random_prompts(workload, 32000, seed=3)
    assert [len(prompt) for prompt in prompts] == [40] * 50
    assert len({tuple(prompt[:4]) for prompt in prompts}) == 50
    assert all(0 <= token < 32000 for prompt in prompts for token in prompt)
    assert prompts == random_prompts(workload, 32000, seed=3)
    assert prompts != random_prompts(workload, 32000, seed=4)


def test_poisson_arrivals():
    arrivals = poisson_arrivals(4.0, 20001, seed=0)
    gaps = np.diff(arrivals)
    assert arrivals[0] == 0.0
    assert (gaps >= 0).all()
    # Of n = 20000 exponential gaps mean and deviation are both 1 / rate, to 1 / sqrt(n) = 0.7 %:
    # the deviation of a sample scatters by sqrt(2) of that. Four times this is 4 %.
    assert gaps.mean() == pytest.approx(0.25, rel=0.03)
    assert gaps.std() == pytest.approx(0.25, rel=0.04)
    assert np.mean(gaps > 0.25) == pytest.approx(np.exp(-1), rel=0.04)
    assert poisson_arrivals(4.0, 100, seed=5) == poisson_arrivals(4.0, 100, seed=5)
    assert poisson_arrivals(4.0, 100, seed=5) != poisson_arrivals(4.0, 100, seed=6)
    assert poisson_arrivals(4.0, 1) == [0.0]
    with pytest.raises(RequestError, match="positive, got 0"):
        poisson_arrivals(0.0, 10)
