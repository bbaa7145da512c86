"""Which devices and backends decode through CUDA graphs."""

import gc
import weakref
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from quatom.benchmark import timing
from quatom.engine import output_graphs
from quatom.engine.cuda_graphs import can_capture, size_classes
from quatom.engine.graph_pool import GraphPool
from quatom.engine.output_graphs import OutputGraphs
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


class Rerun:
    """A model whose last layer is one sum, and a pool whose graphs run it again."""

    def __init__(self):
        self.ran = []

    def finish(self, attended, residual):
        self.ran.append((attended, residual, attended.flatten(1) + residual))
        return self.ran[-1][2]

    def stream(self):
        return nullcontext()

    @contextmanager
    def capture(self):
        graph = SimpleNamespace()
        yield graph
        attended, residual, out = self.ran[-1]
        graph.replay = lambda: out.copy_(attended.flatten(1) + residual)


def test_wanted_rows_are_gathered_and_padded_to_a_size_class(monkeypatch):
    monkeypatch.setattr(output_graphs, "borrow", lambda tensor: tensor)
    model, (attended, residual) = Rerun(), (torch.zeros(20, 2, 3), torch.zeros(20, 6))
    outputs = OutputGraphs(model, model, attended, residual, 5)
    assert sorted({len(ran[1]) for ran in model.ran}) == [1, 2, 4, 5]
    attended, residual = torch.randn(20, 2, 3), torch.randn(20, 6)
    for rows in ([19], [3, 0, 7], [5], [1, 2, 3, 4, 19], [6, 6]):
        got = outputs.replay(attended, residual, torch.tensor(rows))
        assert torch.equal(got, (attended.flatten(1) + residual)[rows])
    assert outputs.replay(attended, residual, torch.tensor([], dtype=torch.int64)).shape == (0, 6)


class Garbage:
    """What only the garbage collector can free."""

    def __init__(self):
        self.itself = self


class Stream:
    """A stream on a machine without a GPU."""

    def __init__(self, *_):
        pass

    def wait_stream(self, _):
        pass

    def synchronize(self):
        pass


class Graph:
    """A graph that captures nothing."""

    def capture_begin(self, **_):
        pass

    def capture_end(self):
        pass


def capture_of_the_engine(inside):
    with GraphPool("cuda").capture():
        inside()


def capture_of_a_measurement(inside):
    timing._capture([inside], 1, None)


@pytest.mark.parametrize("capture", [capture_of_the_engine, capture_of_a_measurement])
@pytest.mark.parametrize("collects", [True, False])
def test_nothing_is_collected_while_a_graph_is_captured(capture, collects, monkeypatch):
    """Freeing an older graph, or a Triton kernel, that garbage holds would end the capture."""
    for name, value in {
        "Stream": Stream,
        "CUDAGraph": Graph,
        "current_stream": Stream,
        "graph_pool_handle": lambda: None,
        "stream": lambda _: nullcontext(),
        "graph": lambda *_, **__: nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    seen = []

    def inside():
        garbage = weakref.ref(Garbage())
        kept = [[] for _ in range(10 * gc.get_threshold()[0])]  # enough for several collections
        seen.append(garbage() is not None and len(kept) > 0)

    was = gc.isenabled()
    (gc.enable if collects else gc.disable)()
    try:
        capture(inside)
        assert gc.isenabled() == collects
    finally:
        (gc.enable if was else gc.disable)()
    assert seen[-1]
