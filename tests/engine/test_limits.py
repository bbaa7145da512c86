"""EngineConfig and SamplingParams refuse what is of another kind than they say."""

import pytest

from quatom.engine.config import EngineConfig
from quatom.errors import EngineError

WRONG_LIMITS = [
    ({"max_num_seqs": 2.5}, "max_num_seqs must be an integer, got 2.5"),
    ({"max_num_seqs": True}, "max_num_seqs must be an integer, got True"),
    ({"max_num_seqs": None}, "max_num_seqs must be an integer, got None"),
    ({"kv_cache_memory": "1GB"}, "kv_cache_memory must be an integer, got '1GB'"),
    ({"max_model_len": 0}, "max_model_len must be at least 1, got 0"),
    ({"prefill_graph_tokens": -1}, "prefill_graph_tokens must be at least 0, got -1"),
    ({"prefix_caching": "no"}, "prefix_caching must be true or false, got 'no'"),
    ({"cuda_graphs": None}, "cuda_graphs must be true or false, got None"),
    ({"memory_fraction": "all"}, "memory_fraction must be a number, got 'all'"),
    ({"memory_fraction": float("nan")}, "memory_fraction must be in (0, 1], got nan"),
]


@pytest.mark.parametrize(("limits", "message"), WRONG_LIMITS)
def test_limits_of_another_kind(limits, message):
    with pytest.raises(EngineError) as caught:
        EngineConfig(**limits)
    assert str(caught.value) == message


def test_limits_that_a_model_and_a_device_decide_may_be_none():
    config = EngineConfig(max_model_len=None, kv_cache_memory=None, overlap=None, max_waiting=None)
    assert (config.max_model_len, config.overlap) == (None, None)
