"""What calibration measures: scores of input channels, and second moments of inputs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from quatom.families.spec import Attention, SiteName
from quatom.modeling.block import DecoderBlock
from quatom.modeling.context import full_sequences_context
from quatom.modeling.decoder import allocate_pages
from quatom.modeling.rotary import RotaryTables
from quatom.numerics.rotary import grow_queries
from quatom.ops.activations import MixedTensor
from quatom.ops.experts import Routing
from quatom.ops.rope_append_kv.reference import rotate_halves
from quatom.quantize.expert_statistics import ExpertInputs

KV_BLOCK_SIZE = 64
"""Tokens of a KV block during calibration; results do not depend on it."""
TOKENS_PER_BATCH = 4096
"""Tokens that run through a block at once: enough to keep matrix products efficient."""
MOMENT_ROWS = 256
"""Rows of second moments that a CPU computes at once: few enough to skip near half of them all."""


Metric = Literal["second_moment", "abs_mean", "absmax"]
"""Of an input channel over all tokens: sum of x**2, sum of |x|, largest |x|."""


class ChannelScores:
    """One metric of each input channel."""

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self.sums: dict[str, Tensor] = {}

    def add(self, site: SiteName, x: Tensor) -> None:  # (T, K)
        """Accumulate the inputs of one batch."""
        if site not in self.sums:
            self.sums[site] = self.zeros(x)
        self.accumulate(self.sums[site], x.float())

    def zeros(self, x: Tensor) -> Tensor:  # (T, K) -> (K,) float32
        """Sums over no input."""
        return x.new_zeros(x.shape[1], dtype=torch.float32)

    def accumulate(self, total: Tensor, x: Tensor) -> None:  # (K,), (T, K) float32
        """Add the scores of some rows."""
        if self.metric == "absmax":
            torch.maximum(total, x.abs().amax(dim=0), out=total)
        else:
            total += (x.abs() if self.metric == "abs_mean" else x.square()).sum(dim=0)


class KeyStatistics:
    """What K's offset and scaling are made of: sums over the q and k of a float block.

    Second moments are those of a rotary pair of channels: rotation leaves them as they are.
    """

    def __init__(self, attention: Attention, length: int, sums: dict[str, Tensor] | None = None):
        """Start from sums, or from none."""
        self.attention, self.length = attention, length
        self.sums: dict[str, Tensor] = {} if sums is None else sums
        """keys (length, KV, D) by position; squares (KV, D / 2) of keys, and of the query heads of
        a KV head together; float32. tokens () int64."""

    def add(self, q: Tensor, k: Tensor) -> None:  # (T, H, D) and (T, KV, D), whole sequences
        """Accumulate the heads of one batch, before rotary embedding."""
        q, k = grow_queries(q.float(), self.attention.query_growth, self.length), k.float()
        squares = [x.square().sum(dim=0).unflatten(-1, (2, -1)).sum(dim=-2) for x in (q, k)]
        found = {
            "keys": k.unflatten(0, (-1, self.length)).sum(dim=0),
            "key_squares": squares[1],
            "query_squares": squares[0].unflatten(0, (self.attention.num_kv_heads, -1)).sum(dim=1),
            "tokens": torch.tensor(len(k), device=k.device),
        }
        for name, part in found.items():
            self.sums[name] = self.sums[name] + part if name in self.sums else part

    def finish(self, rotary: tuple[Tensor, Tensor]) -> dict[str, Tensor]:  # cos, sin
        """Means over all tokens: of K after rotary embedding, and of the squares."""
        cos, sin = (table[: self.length] for table in rotary)
        count = int(self.sums["tokens"])
        return {
            "key_mean": rotate_halves(self.sums["keys"], cos, sin).sum(dim=0) / count,
            "key_squares": self.sums["key_squares"] / count,
            "query_squares": self.sums["query_squares"] / count,
        }


class SecondMoments:
    """X^T X of each site's inputs, (K, K) float32.

    With `tf32` a GPU's matrix unit rounds the inputs to 11 significant bits, finer than the
    bfloat16 that they were computed in, and sums in float32: still the moments of one X, and so
    positive semidefinite. In float32 they would take as long as everything else together.
    """

    def __init__(self, *, tf32: bool = False) -> None:
        self.sums: dict[str, Tensor] = {}
        self.tf32 = tf32

    def add(self, site: SiteName, x: Tensor) -> None:  # (T, K)
        """Accumulate the inputs of one batch."""
        if site not in self.sums:
            self.sums[site] = self.zeros(x)
        self.accumulate(self.sums[site], x.float())

    def zeros(self, x: Tensor) -> Tensor:  # (T, K) -> (K, K) float32
        """Sums over no input."""
        return x.new_zeros(x.shape[1], x.shape[1], dtype=torch.float32)

    def accumulate(self, total: Tensor, x: Tensor) -> None:  # (K, K), (T, K) float32
        """Add the moments of some rows."""
        if not total.is_cpu:
            with _tf32_products() if self.tf32 else nullcontext():
                total.addmm_(x.t(), x)
            return
        # The matrix is symmetric: rows from the diagonal on are computed, and mirrored.
        for first in range(0, len(total), MOMENT_ROWS):
            rows, rest = slice(first, first + MOMENT_ROWS), slice(first + MOMENT_ROWS, None)
            total[rows, first:].addmm_(x[:, rows].t(), x[:, first:])
            total[rest, rows] = total[rows, rest].t()


@contextmanager
def _tf32_products() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


class TargetMoments:
    """Y^T X of each site: the target outputs, times the quantized inputs, (N, K) float32."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, site: SiteName, target: Tensor, x: Tensor) -> None:  # (T, N), (T, K)
        """Accumulate one batch."""
        if site not in self.sums:
            self.sums[site] = x.new_zeros(target.shape[1], x.shape[1], dtype=torch.float32)
        self.sums[site].addmm_(target.float().t(), x.float())


@contextmanager
def observe(
    block: DecoderBlock,
    see_input: Callable[[SiteName, Tensor], None] | None = None,
    *,
    see_output: Callable[[SiteName, Tensor], None] | None = None,
    see_heads: Callable[[Tensor, Tensor, Tensor], None] | None = None,
    see_experts: Callable[[ExpertInputs], None] | None = None,
) -> Iterator[None]:
    """While active, call the given functions with what flows through a block.

    Args:
        block: the block.
        see_input: called with (site, input (T, K)) before the linears of every site; inputs of
            routed experts' down projections are (T k, K) in grouped order.
        see_output: called with (site, output (T, N)) after them.
        see_heads: called with q (T, H, D), k and v (T, KV, D) before rotary embedding.
        see_experts: called with the input of both sites of routed experts, and who reads it.
    """
    routings: list[Routing] = []

    def before(site: SiteName) -> Callable[..., None]:
        def hook(_: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
            x, *rest = arguments
            x = x.dequantize() if isinstance(x, MixedTensor) else x
            if see_input is not None:
                see_input(site, x)
            if rest and see_experts is not None:
                groups, top_k = rest
                see_experts(ExpertInputs(site, x, top_k, groups, routings[-1]))

        return hook

    def routing(_: torch.nn.Module, __: object, output: Routing) -> None:
        routings[:] = [output]

    def after(site: SiteName) -> Callable[..., None]:
        def hook(_: torch.nn.Module, __: object, output: Tensor) -> None:
            assert see_output is not None
            see_output(site, output)

        return hook

    def heads(_: torch.nn.Module, __: object, output: tuple[Tensor, Tensor, Tensor]) -> None:
        assert see_heads is not None
        q, k, v = output
        see_heads(*block.heads.normalize(q, k), v)

    handles = []
    for site in block.plan.sites:
        linear = block.linears[site]
        if see_input is not None or see_experts is not None:
            handles.append(linear.register_forward_pre_hook(before(site)))
        if see_output is not None:
            handles.append(linear.register_forward_hook(after(site)))
    if see_experts is not None:
        assert block.router is not None
        handles.append(block.router.register_forward_hook(routing))
    if see_heads is not None:
        handles.append(block.heads.register_forward_hook(heads))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Zeros(torch.nn.Module):
    """Stands in for a linear whose output nobody reads."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, x: Tensor | MixedTensor, *_: object) -> Tensor:  # (T, K) -> (T, N)
        return torch.zeros(x.shape[0], self.rows, dtype=x.dtype, device=x.device)


@contextmanager
def inputs_alone(block: DecoderBlock) -> Iterator[None]:
    """While active, a block's last linears multiply nothing: nobody reads its output."""
    last: tuple[SiteName, ...] = ("down", "experts_down")
    linears = {site: block.linears[site] for site in last if site in block.linears}
    for site in linears:
        block.linears[site] = _Zeros(block.plan.sites[site].rows)
    try:
        yield
    finally:
        for site, linear in linears.items():
            block.linears[site] = linear


def sequences_per_batch(length: int) -> int:
    """Sequences of a batch, of so many tokens each."""
    return max(1, TOKENS_PER_BATCH // length)


def batch_slices(hidden: Tensor) -> Iterator[slice]:
    """Sequences that run through a block together, TOKENS_PER_BATCH at most."""
    per_batch = sequences_per_batch(hidden.shape[1])
    for start in range(0, hidden.shape[0], per_batch):
        yield slice(start, min(start + per_batch, hidden.shape[0]))


@torch.no_grad()
def run_batch(
    block: DecoderBlock,
    batch: Tensor,  # (sequences, length, hidden)
    rotary: RotaryTables,
) -> Tensor:
    """The block's output, residual added, for whole sequences from position 0."""
    count, length, _ = batch.shape
    context = full_sequences_context(count, length, KV_BLOCK_SIZE, batch.device)
    pages = allocate_pages(block.plan, context.block_tables.numel(), KV_BLOCK_SIZE, like=batch)
    output, residual = block(batch.flatten(0, 1), None, context, pages, rotary)
    return (output + residual).view_as(batch)


def run_block(
    block: DecoderBlock,
    hidden: Tensor,  # (sequences, length, hidden)
    rotary: RotaryTables,
) -> Tensor:
    """`run_batch` over all sequences."""
    out = torch.empty_like(hidden)
    for rows in batch_slices(hidden):
        out[rows] = run_batch(block, hidden[rows], rotary)
    return out
