"""Where CUDA graphs are captured: one stream and one memory pool for all graphs of an engine.

Only one graph runs at a time, and what it leaves is read before the next one starts. So the memory
of a captured graph is handed back to the pool and used again by the next one: 512 rows of 128256
logits are 263 MB, and there are dozens of sizes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from quatom.engine.host_memory import no_garbage_collection

_INTEGERS = {1: ("|u1", torch.uint8), 2: ("<i2", torch.int16), 4: ("<i4", torch.int32)}
"""Of an element's size: the type that every array library knows."""


class GraphPool:
    """Captures graphs that never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        # One stream for all captures: cuBLAS keeps a workspace for every stream it has seen.
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Run on the stream of the captures: what is compiled and allocated here is theirs."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream().wait_stream(self._stream)

    @contextmanager
    def capture(self) -> Iterator[Any]:  # of torch.cuda.CUDAGraph
        """The graph of what is queued inside.

        `torch.cuda.graph` would collect garbage and empty the allocator's cache before each of the
        hundreds of captures.
        """
        graph = torch.cuda.CUDAGraph()
        with self.stream(), no_garbage_collection():
            graph.capture_begin(pool=self._pool)
            try:
                yield graph
            finally:
                graph.capture_end()


class _Memory:
    """Device memory by address, for torch to see as a tensor."""

    def __init__(self, tensor: Tensor, typestr: str) -> None:
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape),
            "typestr": typestr,
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }


def record(pool: GraphPool, run: Callable[[], Tensor]) -> tuple[Any, Tensor]:
    """The graph of a call and where it leaves its result, which the pool may hand out again."""
    with pool.stream():  # compile and autotune outside of the capture
        run()
    with pool.capture() as graph:
        made = run()
    return graph, borrow(made)


def borrow(tensor: Tensor) -> Tensor:
    """The same contiguous memory, not owned: the pool may hand it out again."""
    assert tensor.is_contiguous()
    typestr, integer = _INTEGERS[tensor.element_size()]
    memory = _Memory(tensor, typestr)
    return torch.as_tensor(memory, dtype=integer, device=tensor.device).view(tensor.dtype)
