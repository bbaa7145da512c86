"""Speed of the expert kernel beside the dense one at equal work and a grouped product in BF16.

*Equal work* of the dense kernel is the faster of two layers of as many operations: the experts that
tokens are routed to side by side, under their mean number of tokens, which reads the same weights;
and, from `_MANY_ROWS` rows per expert on, all rows under the weights of one expert.

Our times include the arranging of tokens; the grouped product is given rows in grouped order.
`share_of_copy` counts the bytes of the experts that tokens are routed to.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from quatom.benchmark.kernel_operands import (
    OUTLIERS,
    random_activations,
    random_weights,
    relative_error,
)
from quatom.benchmark.timing import Timing, copies_to_rotate, time_graphs
from quatom.numerics.groups import GroupLayout, ScaleMode
from quatom.ops.activations import MixedTensor
from quatom.ops.backend import Backend
from quatom.ops.experts import (
    PreparedExperts,
    TokenGroups,
    combine,
    expert_linear,
    group_tokens,
    prepare_experts,
)
from quatom.ops.linear.cuda import linear_cuda

TOKENS = (1, 16, 64, 256, 1024, 4096)
"""Before routing."""
SCHEMES: tuple[tuple[str, str, ScaleMode], ...] = (
    ("w4a8", "int8", "row"),
    ("w4a4", "int4", "multiples"),
    ("w4a4-groups", "int4", "group"),
)
_MANY_ROWS = 64
_MOST_CALLS = 16
"""Routings that take turns in a graph."""

Calls = list[Callable[[], object]]


@dataclass(frozen=True)
class ExpertShape:
    """One product of a layer of experts."""

    name: str
    experts: int
    top_k: int
    channels: int
    """N."""
    k: int
    gathered: bool
    """Whether the input has a row per token, as gate and up, or per slot, as down."""

    @property
    def layout(self) -> GroupLayout:
        """Groups of 128 channels, the last of them outliers."""
        return GroupLayout(self.k - OUTLIERS, 128, OUTLIERS)

    def route(self, tokens: int) -> TokenGroups:
        """Tokens routed to `top_k` random experts each."""
        scores = torch.rand(tokens, self.experts, device="cuda")
        return group_tokens(scores.topk(self.top_k).indices.int(), self.experts)


SHAPES = (
    ExpertShape("mixtral-8x7b gate_up", 8, 2, 28672, 4096, True),
    ExpertShape("mixtral-8x7b down", 8, 2, 4096, 14336, False),
    ExpertShape("qwen3-30b-a3b gate_up", 128, 8, 1536, 2048, True),
    ExpertShape("qwen3-30b-a3b down", 128, 8, 2048, 768, False),
)


def measure_experts(copy_tb_s: float) -> Iterator[Iterator[dict[str, Any]]]:
    """Rows of the result file, a shape and a number of tokens at a time."""
    for shape in SHAPES:
        problem = ExpertProblem.make(shape)
        for tokens in TOKENS:
            yield problem.measure(tokens, copy_tb_s)
        if not shape.gathered:
            yield from (_around(shape, tokens, copy_tb_s) for tokens in TOKENS)


@dataclass(frozen=True)
class ExpertProblem:
    """One shape with the weights of our kernel and of torch's."""

    shape: ExpertShape
    values: Tensor
    """Codes of the first expert, (N, K) int8."""
    scales: Tensor
    prepared: dict[str, PreparedExperts]
    """By scheme."""
    floats: Tensor
    """(E, N, K) bfloat16."""

    @classmethod
    def make(cls, shape: ExpertShape) -> "ExpertProblem":
        """Random weights."""
        layout = shape.layout
        pairs = [random_weights(shape.channels, layout) for _ in range(shape.experts)]
        values = torch.stack([pair[0] for pair in pairs])
        scales = torch.stack([pair[1] for pair in pairs])
        prepare = partial(prepare_experts, values, scales, layout, backend=Backend.CUDA)
        integer = prepare(activation_format="int8", scale_mode="row")
        grouped = prepare(activation_format="int4", scale_mode="group")
        prepared = {
            scheme: replace(grouped if mode == "group" else integer, activation_format=fmt)
            for scheme, fmt, mode in SCHEMES
        }
        size = (shape.experts, shape.channels, shape.k)
        floats = torch.randn(size, device="cuda", dtype=torch.bfloat16)
        return cls(shape, *pairs[0], prepared, floats)

    def measure(self, tokens: int, copy_tb_s: float) -> Iterator[dict[str, Any]]:
        """Our kernel, the dense one and torch's, in turns over the same routings."""
        shape = self.shape
        one = self.prepared[SCHEMES[0][0]].tensors[0][0].numel()
        positions = tokens * shape.top_k
        touched_at_least = shape.top_k if tokens == 1 else min(shape.experts, positions)
        count = min(_MOST_CALLS, copies_to_rotate(one * touched_at_least))
        routings = [shape.route(tokens) for _ in range(count)]
        touched = [int((g.offsets.diff() > 0).sum()) for g in routings]
        mean_touched = sum(touched) / count

        runs: list[tuple[str, str, float | None, float | None, Calls]] = []
        for scheme, fmt, mode in SCHEMES:
            experts = self.prepared[scheme]
            rows = tokens if shape.gathered else positions
            x = random_activations(rows, shape.layout, fmt, "groups", mode)
            top_k = shape.top_k if shape.gathered else None
            calls: Calls = [partial(expert_linear, x, experts, g, top_k=top_k) for g in routings]
            least = one * mean_touched + x.codes.numel() + 2 * positions * shape.channels
            error = self._error(x, experts, routings[0], top_k)
            runs.append((scheme, "cuda", least, error, calls))
            for name, dense in self._dense(experts, positions, touched, fmt, mode):
                of_experts = least if name == "dense-wide" else None
                runs.append((f"{scheme}:{name}", "cuda", of_experts, None, dense))
        grouped = torch.randn(positions, shape.k, device="cuda", dtype=torch.bfloat16)
        transposed = self.floats.transpose(1, 2)
        least = 2 * (self.floats[0].numel() * mean_touched + grouped.numel())
        least += 2 * positions * shape.channels
        calls = [partial(grouped_mm, grouped, transposed, offs=g.offsets[1:]) for g in routings]
        runs.append(("bf16-grouped", "peer", least, None, calls))

        timings = time_graphs([run[-1] for run in runs], min_calls=8 if tokens < 1024 else 2)
        times = {run[0]: t.median_us for run, t in zip(runs, timings, strict=True)}
        for (scheme, backend, bytes_, error, _), timing in zip(runs, timings, strict=True):
            dense_times = [t for name, t in times.items() if name.startswith(f"{scheme}:dense")]
            yield self._entry(scheme, backend, tokens, timing) | {
                "touched": round(mean_touched, 1),
                "share_of_copy": None
                if bytes_ is None
                else round(bytes_ / copy_tb_s / 1e6 / timing.median_us, 3),
                "ratio_dense": round(min(dense_times) / timing.median_us, 3)
                if dense_times
                else None,
                "ratio_bf16": round(times["bf16-grouped"] / timing.median_us, 2),
                "relative_error": error,
            }

    def _dense(
        self,
        experts: PreparedExperts,
        positions: int,
        touched: list[int],
        fmt: str,
        mode: ScaleMode,
    ) -> Iterator[tuple[str, Calls]]:
        """The dense kernel on layers of equal work; see the module."""
        shape = self.shape
        count = round(sum(touched) / len(touched))
        x = random_activations(max(1, positions // count), shape.layout, fmt, "groups", mode)
        starts = [index * count % (shape.experts - count + 1) for index in range(len(touched))]
        wide = [tuple(t[s : s + count].flatten(0, 1) for t in experts.tensors) for s in starts]
        yield "dense-wide", [partial(linear_cuda, x, w, count * shape.channels, None) for w in wide]
        if positions >= _MANY_ROWS * shape.experts:
            x = random_activations(positions, shape.layout, fmt, "groups", mode)
            one = [tuple(t[index] for t in experts.tensors) for index in range(shape.experts)]
            yield "dense-tall", [partial(linear_cuda, x, w, shape.channels, None) for w in one[:2]]

    def _entry(self, scheme: str, backend: str, tokens: int, timing: Timing) -> dict[str, Any]:
        shape = self.shape
        m = tokens * shape.top_k
        return {
            "op": "experts",
            "model": shape.name,
            "scheme": scheme,
            "backend": backend,
            "experts": shape.experts,
            "top_k": shape.top_k,
            "tokens": tokens,
            "m": m,
            "n": shape.channels,
            "k": shape.k,
            "microseconds": round(timing.median_us, 2),
            "p10": round(timing.p10_us, 2),
            "p90": round(timing.p90_us, 2),
            "tops": round(2 * m * shape.channels * shape.k / timing.median_us / 1e6, 1),
        }

    def _error(
        self, x: MixedTensor, experts: PreparedExperts, groups: TokenGroups, top_k: int | None
    ) -> float | None:
        """Of the first expert's rows against float64; None where it has none."""
        rows = int(groups.offsets[1])
        if not rows:
            return None
        y = expert_linear(x, experts, groups, top_k=top_k)[:rows]
        own = torch.arange(rows, device="cuda")
        if top_k is not None:
            own = groups.slots[:rows].long() // top_k
        return relative_error(y, x, self.values, self.scales, own)


def _around(shape: ExpertShape, tokens: int, copy_tb_s: float) -> Iterator[dict[str, Any]]:
    """What surrounds the products of a layer: the sort of slots and the weighted sum."""
    ids = torch.rand(tokens, shape.experts, device="cuda").topk(shape.top_k).indices.int()
    groups = group_tokens(ids, shape.experts)
    y = torch.randn(ids.numel(), shape.channels, device="cuda").half()
    weights = torch.rand(tokens, shape.top_k, device="cuda")
    calls: dict[str, tuple[int, Callable[[], object]]] = {
        "group_tokens": (12 * ids.numel(), partial(group_tokens, ids, shape.experts)),
        "combine": (
            2 * y.numel() + 2 * tokens * shape.channels,
            partial(combine, y, groups, weights),
        ),
    }
    timings = time_graphs([[call] for _, call in calls.values()])
    for (op, (least, _)), timing in zip(calls.items(), timings, strict=True):
        yield {
            "op": op,
            "model": shape.name,
            "scheme": None,
            "backend": "triton",
            "experts": shape.experts,
            "top_k": shape.top_k,
            "tokens": tokens,
            "m": ids.numel(),
            "n": shape.channels,
            "k": None,
            "microseconds": round(timing.median_us, 2),
            "p10": round(timing.p10_us, 2),
            "p90": round(timing.p90_us, 2),
            "share_of_copy": round(least / copy_tb_s / 1e6 / timing.median_us, 3),
        }
