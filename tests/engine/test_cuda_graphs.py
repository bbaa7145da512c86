"""Which devices and backends decode through CUDA graphs."""

import pytest
import torch

from quatom.engine.cuda_graphs import can_capture, size_classes
from quatom.engine.prefill_graphs import PrefillGraphs, prefill_sizes
from quatom.errors import BackendError


def test_only_backends_that_never_wait_for_the_gpu_are_captured(monkeypatch):
    monkeypatch.delenv("QUATOM_BACKEND", raising=False)
    assert can_capture(torch.device("cuda"))
    assert not can_capture(torch.device("cpu"))
    monkeypatch.setenv("QUATOM_BACKEND", "triton")
    assert can_capture(torch.device("cuda"))
    monkeypatch.setenv("QUATOM_BACKEND", "reference")
    assert not can_capture(torch.device("cuda"))
    monkeypatch.setenv("QUATOM_BACKEND", "nothing")
    with pytest.raises(BackendError, match="no backend 'nothing'"):
        can_capture(torch.device("cuda"))


@pytest.mark.parametrize("largest", [1, 2, 8, 63, 64, 200, 512])
def test_every_batch_has_a_size_class_not_much_larger(largest):
    sizes = size_classes(largest)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == largest
    for batch in range(1, largest + 1):
        above = next(size for size in sizes if size >= batch)
        assert above - batch < max(8, batch // 4)


@pytest.mark.parametrize(
    ("most", "sizes"),
    [
        (20, [20]),
        (64, [64]),
        (100, [64, 96, 100]),
        (2048, [64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048]),
    ],
)
def test_size_classes_of_prefill_steps(most, sizes):
    assert prefill_sizes(most) == sizes


class Sizes(PrefillGraphs):
    """Size classes without anything captured."""

    def __init__(self, most):
        self._sizes = prefill_sizes(most)


def test_large_steps_are_hardly_padded():
    graphs = Sizes(2048)
    assert [graphs.size_of(tokens) for tokens in (1, 65, 400, 512)] == [64, 96, 512, 512]
    assert [graphs.size_of(tokens) for tokens in (513, 671, 672, 896, 1024)] == [
        None,
        None,
        768,
        1024,
        1024,
    ]
    assert [graphs.size_of(tokens) for tokens in (1791, 1792, 2048, 2049)] == [
        None,
        2048,
        2048,
        None,
    ]
