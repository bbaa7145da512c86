"""Which devices and backends decode through CUDA graphs."""

import pytest
import torch

from quatom.engine.cuda_graphs import can_capture, size_classes
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
