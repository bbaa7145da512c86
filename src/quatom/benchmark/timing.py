"""Time of GPU work: CUDA-graph replays between events, inputs rotated out of the L2 cache."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from quatom.engine.host_memory import no_garbage_collection

L2_BYTES_TO_ROTATE = 128 * 2**20
"""Copies of an operand that rotate hold at least this much together: 2.5 times an H100's L2."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Time of one call, over repeated measurements."""

    median_us: float
    p10_us: float
    p90_us: float


def copies_to_rotate(operand_bytes: int, most: int = 64) -> int:
    """How many copies of an operand make its next use come from HBM instead of the L2 cache."""
    return min(most, max(2, -(-L2_BYTES_TO_ROTATE // max(operand_bytes, 1))))


def time_graph(
    calls: Sequence[Callable[[], object]],
    *,
    repeats: int = 15,
    min_calls: int = 8,
) -> Timing:
    """Time of one call among `calls`: see `time_graphs`."""
    return time_graphs([calls], repeats=repeats, min_calls=min_calls)[0]


def time_graphs(
    operations: Sequence[Sequence[Callable[[], object]]],
    *,
    repeats: int = 15,
    min_calls: int = 8,
) -> list[Timing]:
    """Times of several operations in turns, so that all of them meet the same GPU temperature.

    An operation is a sequence of calls that run one after another inside one CUDA graph. Pass the
    same operation on different copies of its operands (`copies_to_rotate`), so that each call finds
    its weights in HBM as it would inside a model. The graph holds every call at least once and at
    least `min_calls` calls; its replay time is divided by their number, so the value includes
    launch gaps as a captured model has them.
    """
    pool = torch.cuda.graph_pool_handle()  # shared: nothing that a replay writes is read
    graphs = [_capture(calls, min_calls, pool) for calls in operations]
    for graph, _ in graphs:
        for _ in range(2):
            graph.replay()
    events: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in graphs]
    for _ in range(repeats):
        for (graph, _), measured in zip(graphs, events, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            measured.append((start, end))
    torch.cuda.synchronize()
    timings = []
    for (_, count), measured in zip(graphs, events, strict=True):
        times = sorted(start.elapsed_time(end) * 1e3 / count for start, end in measured)
        timings.append(
            Timing(
                median_us=statistics.median(times),
                p10_us=times[len(times) // 10],
                p90_us=times[-1 - len(times) // 10],
            )
        )
    return timings


def _capture(
    calls: Sequence[Callable[[], object]], min_calls: int, pool: Any
) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of all calls, repeated until there are `min_calls`, and their number."""
    sequence = list(calls) * max(1, -(-min_calls // len(calls)))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # operands may still be on their way
    with torch.cuda.stream(stream):
        for call in calls:  # compile and load modules outside the capture
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with no_garbage_collection(), torch.cuda.graph(graph, pool=pool, stream=stream):
        for call in sequence:
            call()
    return graph, len(sequence)
