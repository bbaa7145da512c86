"""Which devices and backends decode through CUDA graphs."""

import gc
import weakref
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from quatom.benchmark import timing
from quatom.engine import graph_pool, prefill_graphs
from quatom.engine.cuda_graphs import can_capture, size_classes
from quatom.engine.graph_pool import GraphPool
from quatom.engine.prefill_graphs import PrefillGraphs, prefill_sizes
from quatom.errors import BackendError
from quatom.loading import load
from quatom.modeling.context import ForwardContext, advance
from tests.families.models import save_tiny


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


class Recorded:
    """A model and a pool on a CPU: a graph runs again what was called while it was captured."""

    def __init__(self, model):
        self.model, self.graph, self.given, self.again = model, SimpleNamespace(), {}, {}

    def stream(self):
        return nullcontext()

    @contextmanager
    def capture(self):
        graph = self.graph = SimpleNamespace()
        yield graph
        self.graph = SimpleNamespace()  # of what runs outside of captures

    def stages(self, *given):
        run = self.model.stages(*given)
        self.given[run] = given
        return run

    def advance(self, run, attended):
        stop, last = advance(run, attended)

        def replay():
            if attended is None:
                self.given[run][1].shared.clear()  # the reference's, of other positions
                self.again[run] = self.model.stages(*self.given[run])
            found, _ = advance(self.again[run], attended)
            stop.q.copy_(found.q)
            stop.residual.copy_(found.residual)

        self.graph.replay = replay
        return stop, last

    def finish(self, *given):
        out = self.model.finish(*given)
        self.graph.replay = lambda: out.copy_(self.model.finish(*given))
        return out


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_prefill_graphs_run_what_a_forward_pass_does(name, tmp_path, monkeypatch):
    model = load(save_tiny(tmp_path / "model", name)).model
    pool = Recorded(model)
    for module in (prefill_graphs, graph_pool):
        monkeypatch.setattr(module, "borrow", lambda tensor: tensor)
    monkeypatch.setattr(prefill_graphs, "advance", pool.advance)
    caches = [model.allocate_kv_cache(8, 16) for _ in range(2)]
    device = torch.device("cpu")
    graphs = PrefillGraphs(pool, caches[0], pool, max_num_tokens=96, max_num_seqs=3, device=device)
    start = 0
    for length, rows in ((50, [49]), (64, [63, 1, 30]), (5, []), (7, None), (1, [0])):
        ids = torch.arange(start, start + length) % 250
        context = ForwardContext(
            positions=torch.arange(start, start + length),
            slot_mapping=torch.arange(start, start + length),
            block_tables=torch.arange(8, dtype=torch.int32)[None],
            cu_seqlens_q=torch.tensor([0, length], dtype=torch.int32),
            seq_lens=torch.tensor([start + length], dtype=torch.int32),
            max_seqlen_q=length,
            max_seq_len=start + length,
        )
        wanted = None if rows is None else torch.tensor(rows, dtype=torch.int64)
        got = graphs.replay(ids, SimpleNamespace(context=context), wanted)
        want = model(ids, context, caches[1], wanted)
        assert got.shape == want.shape
        # Float32 products of more rows add in another order.
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-4)
        start += length  # each step reads what those before have stored


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
