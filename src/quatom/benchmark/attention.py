"""Latency of the self-attention layer over the paged cache, beside torch's attention over BF16.

`share_of_copy` is the time that the least possible bytes (the cached tokens, read once; for append
its inputs and outputs) would take at the measured copy bandwidth, over the measured time. Peers
read contiguous BF16 K and V, the layout that suits them best.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from quatom.benchmark.attention_peers import time_decode_peers, time_prefill_peers
from quatom.benchmark.environment import describe_environment, measure_ceilings, write_results
from quatom.benchmark.timing import Timing, copies_to_rotate, time_graph
from quatom.numerics.kv_pages import KVDtype, KVPages, bytes_per_token_head
from quatom.ops.attention import AttentionOptions, attention
from quatom.ops.attention.reference import causal_attention
from quatom.ops.backend import Backend
from quatom.ops.rope_append_kv import rope_append_kv

BLOCK_SIZE = 64
_DECODE_BACKENDS: tuple[tuple[KVDtype, Backend], ...] = (
    ("int4", Backend.CUDA),
    ("int4", Backend.TRITON),
    ("int8", Backend.TRITON),
    ("bfloat16", Backend.TRITON),
)
MOST_BYTES = 12e9
"""Cases whose BF16 cache is larger are measured without BF16 peers."""
Op = Literal["decode", "prefill", "append"]


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the grid."""

    op: Op
    batch: int
    length: int
    """Cached tokens of each sequence, the new ones included."""
    num_heads: int
    num_kv_heads: int
    head_dim: int = 128
    new_tokens: int = 1

    @property
    def cached_tokens(self) -> int:
        """Tokens in the cache, all sequences together."""
        return self.batch * self.length


_HEADS = ((32, 32), (32, 8))
GRID = (
    *(
        Case("decode", batch, length, *heads)
        for heads in _HEADS
        for length, batches in (
            (1024, (1, 8, 16, 32, 64, 128, 256)),
            (4096, (1, 16, 64)),
            (32768, (1, 8)),
        )
        for batch in batches
    ),
    *(Case("decode", 64, 4096, 32, 8, head_dim) for head_dim in (64, 96, 256)),
    Case("decode", 64, 4096, 64, 8),
    Case("decode", 64, 4096, 32, 8, new_tokens=4),
    *(
        Case("prefill", 1, length, *heads, new_tokens=new)
        for heads in _HEADS
        for new, length in ((512, 4096), (2048, 2048), (4096, 8192))
    ),
    *(
        Case("append", 1, tokens, *heads, new_tokens=tokens)
        for heads in _HEADS
        for tokens in (1, 64, 4096)
    ),
)


def run_attention_benchmark(
    *,
    json: Path | None = None,
    plot: Path | None = None,
    report: Callable[[str], None] = print,
    grid: tuple[Case, ...] = GRID,
) -> list[dict[str, Any]]:
    """Measure the grid on the current GPU; write the result file and the plot where asked.

    Args:
        json: result file to write (the form of `attention-GPU.json`).
        plot: image to write: latency over batch size, MHA and GQA.
        report: called with one line a measurement.
        grid: cases to measure.
    """
    environment = describe_environment() | measure_ceilings()
    results = []
    for case in grid:
        measure = {"decode": _decode, "prefill": _prefill, "append": _append}[case.op]
        rows = measure(case, environment["copy_tb_s"])
        _add_ratios(rows)
        results += rows
        for row in rows:
            report(_line(row))
        torch.cuda.empty_cache()
    if json is not None:
        write_results(json, "quatom bench attention --json", environment, results)
    if plot is not None:
        plot_attention(results, plot, environment.get("gpu", "GPU"))
    return results


def _row(
    case: Case,
    kv: str,
    backend: str,
    timing: Timing,
    share: float | None = None,
    relative_error: float | None = None,
) -> dict[str, Any]:
    return {
        "op": case.op,
        "kv": kv.replace("bfloat16", "bf16"),
        "backend": backend,
        "batch": case.batch,
        "length": case.length,
        "new_tokens": case.new_tokens,
        "num_heads": case.num_heads,
        "num_kv_heads": case.num_kv_heads,
        "head_dim": case.head_dim,
        "microseconds": round(timing.median_us, 2),
        "p10": round(timing.p10_us, 2),
        "p90": round(timing.p90_us, 2),
        "share_of_copy": None if share is None else round(share, 4),
        "relative_error": relative_error,
    }


def _add_ratios(rows: list[dict[str, Any]]) -> None:
    """Time of each BF16 peer over the time of every row of the same case."""
    for name in ("cudnn", "flash"):
        peer = [row["microseconds"] for row in rows if row["backend"] == f"peer:{name}"]
        for row in rows:
            ratio = round(peer[0] / row["microseconds"], 3) if peer else None
            row[f"ratio_{name}_bf16"] = ratio


def _line(row: dict[str, Any]) -> str:
    shape = f"{row['batch']} x {row['length']}, new {row['new_tokens']}"
    heads = f"{row['num_heads']}/{row['num_kv_heads']} x {row['head_dim']}"
    share = "" if row["share_of_copy"] is None else f"{row['share_of_copy']:.1%} of copy"
    ratios = " ".join(
        f"{row[key]:.2f}x {key[6:-5]}"
        for key in ("ratio_cudnn_bf16", "ratio_flash_bf16")
        if row.get(key)
    )
    error = "" if row["relative_error"] is None else f"error {row['relative_error']:.1e}"
    return (
        f"{row['op']:8}{shape:24}{heads:14}{row['kv']:6}{row['backend']:14}"
        f"{row['microseconds']:9.1f} us  {share:15}{ratios:28}{error}"
    )


def _random_pages(case: Case, kv: KVDtype, copies: int) -> KVPages:
    """Pages of random codes with the spread of standard normal K and V."""
    blocks = copies * case.batch * -(-case.length // BLOCK_SIZE)
    pages = KVPages.allocate(
        blocks, BLOCK_SIZE, case.num_kv_heads, case.head_dim, kv, torch.device("cuda")
    )
    if not pages.quantized:
        for rows in (pages.keys, pages.values):
            rows.normal_()
        return pages
    pages.storage.random_(0, 256)
    top = 2**pages.bits - 1
    for pairs in (pages.key_pairs, pages.value_pairs):
        minimum = -2.5 - torch.rand(pairs.shape[:-1], device="cuda")
        pairs[..., 0] = (2.5 + torch.rand_like(minimum) - minimum) / top
        pairs[..., 1] = minimum
    return pages


def _tables(case: Case, copies: int) -> list[Tensor]:
    """Block tables of each copy, in random order."""
    blocks = case.batch * -(-case.length // BLOCK_SIZE)
    return [
        (torch.randperm(blocks, device="cuda") + copy * blocks).view(case.batch, -1).int()
        for copy in range(copies)
    ]


def _arguments(case: Case) -> dict[str, Any]:
    new = case.new_tokens
    starts = torch.arange(0, (case.batch + 1) * new, new, device="cuda", dtype=torch.int32)
    return {
        "cu_seqlens_q": starts,
        "seq_lens": torch.full((case.batch,), case.length, device="cuda", dtype=torch.int32),
        "max_seqlen_q": new,
        "max_seq_len": case.length,
    }


def _query(case: Case) -> Tensor:
    shape = (case.batch * case.new_tokens, case.num_heads, case.head_dim)
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def _relative_error(case: Case, q: Tensor, out: Tensor, pages: KVPages, table: Tensor) -> float:
    """Error of the last sequence against float64 over what its pages dequantize to."""
    k, v = (x.double() for x in pages.gather(table[-1], case.length))
    options = AttentionOptions(case.head_dim**-0.5)
    new = min(case.new_tokens, 64)
    want = causal_attention(q[-new:].double(), k, v, options)
    return float(f"{(out[-new:].double() - want).norm() / want.norm():.2e}")


def _decode(case: Case, copy_tb_s: float) -> list[dict[str, Any]]:
    rows = []
    q, arguments = _query(case), _arguments(case)
    for kv, backend in _DECODE_BACKENDS:
        total = case.cached_tokens * case.num_kv_heads * bytes_per_token_head(case.head_dim, kv)
        if total > MOST_BYTES:
            continue
        copies = copies_to_rotate(total)
        pages, tables = _random_pages(case, kv, copies), _tables(case, copies)
        call = partial(attention, q, pages, **arguments, backend=backend)
        timing = time_graph([partial(call, block_tables=table) for table in tables])
        error = _relative_error(case, q, call(block_tables=tables[0]), pages, tables[0])
        share = total / copy_tb_s / 1e6 / timing.median_us
        rows.append(_row(case, kv, backend, timing, share, error))
        del pages, call
    bf16_bytes = case.cached_tokens * case.num_kv_heads * case.head_dim * 4
    if bf16_bytes <= MOST_BYTES and case.new_tokens == 1:
        shape = (case.batch, case.num_heads, case.num_kv_heads, case.length, case.head_dim)
        for name, timing in time_decode_peers(*shape, block_size=BLOCK_SIZE).items():
            share = bf16_bytes / copy_tb_s / 1e6 / timing.median_us
            rows.append(_row(case, "bfloat16", f"peer:{name}", timing, share))
    return rows


def _prefill(case: Case, copy_tb_s: float) -> list[dict[str, Any]]:
    rows = []
    q, arguments = _query(case), _arguments(case)
    pages, table = _random_pages(case, "int4", 1), _tables(case, 1)[0]
    arguments |= {"block_tables": table, "total_kv_tokens": case.cached_tokens}
    for backend in (Backend.CUDA, Backend.TRITON):
        call = partial(attention, q, pages, **arguments, backend=backend)
        timing = time_graph([call], min_calls=2)
        error = _relative_error(case, q, call(), pages, table)
        rows.append(_row(case, "int4", backend, timing, relative_error=error))
    shape = (case.new_tokens, case.length, case.num_heads, case.num_kv_heads, case.head_dim)
    peers = time_prefill_peers(*shape)
    return [*rows, *(_row(case, "bfloat16", f"peer:{name}", time) for name, time in peers.items())]


def _append(case: Case, copy_tb_s: float) -> list[dict[str, Any]]:
    tokens, dim = case.new_tokens, case.head_dim
    heads, kv_heads = case.num_heads, case.num_kv_heads
    fused = torch.randn(tokens, heads + 2 * kv_heads, dim, device="cuda", dtype=torch.bfloat16)
    q, k, v = fused.split((heads, kv_heads, kv_heads), dim=1)
    angle = torch.rand(tokens, dim // 2, device="cuda")
    positions, slots = torch.arange(tokens, device="cuda"), torch.randperm(tokens, device="cuda")
    inputs = (q, k, v, angle.cos(), angle.sin(), positions, slots)
    rows = []
    for kv in ("int4", "int8", "bfloat16"):
        blocks = -(-tokens // BLOCK_SIZE)
        pages = KVPages.allocate(blocks, BLOCK_SIZE, kv_heads, dim, kv, torch.device("cuda"))
        total = fused.nbytes + 2 * q.numel() + tokens * pages.bytes_per_token
        for backend in (Backend.CUDA, Backend.TRITON):
            timing = time_graph([partial(rope_append_kv, *inputs, pages, backend=backend)])
            share = total / copy_tb_s / 1e6 / timing.median_us
            rows.append(_row(case, kv, backend, timing, share))
    return rows


def plot_attention(results: list[dict[str, Any]], path: Path, gpu: str) -> None:
    """Decode latency over batch size at 1024 tokens: INT4 pages beside BF16, MHA and GQA."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    series = (
        ("int4", "cuda", "Quatom INT4, CUDA"),
        ("int4", "triton", "Quatom INT4, Triton"),
        ("bf16", "peer:cudnn", "BF16, cuDNN"),
        ("bf16", "peer:flash", "BF16, FlashAttention-2"),
    )
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, (heads, kv_heads) in zip(axes, _HEADS, strict=True):
        for kv, backend, label in series:
            points = sorted(
                (row["batch"], row["microseconds"])
                for row in results
                if (row["op"], row["kv"], row["backend"]) == ("decode", kv, backend)
                and (row["num_heads"], row["num_kv_heads"]) == (heads, kv_heads)
                and (row["length"], row["head_dim"], row["new_tokens"]) == (1024, 128, 1)
            )
            axis.plot(*zip(*points, strict=True), marker="o", label=label)
        axis.set(
            xscale="log",
            yscale="log",
            xlabel="sequences of 1024 tokens",
            title=f"{heads} heads, {kv_heads} KV heads x 128",
        )
        axis.grid(visible=True, which="both", alpha=0.3)
    axes[0].set_ylabel("microseconds per layer")
    axes[0].legend()
    figure.suptitle(f"Latency of the self-attention layer, decode, {gpu}")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
