"""Speed of the linear, expert and quantize kernels beside the peers found installed, in one run.

Every time is the median of CUDA-graph replays, weights rotated out of the L2 cache. Our kernel and
its peers take turns on each problem, because a GPU slows down as it warms up.
`share_of_copy` is the time that the least bytes (weights, activations, result, each once) would
take at the measured copy bandwidth, over the measured time. Peers: cuBLAS BF16, cuBLASLt INT8 and
FP8 without groups (`torch._int_mm`, `torch._scaled_mm`), and humming's W4A8 kernels, the GEMM
alone.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quatom.benchmark.environment import describe_environment, measure_ceilings, write_results
from quatom.benchmark.experts import measure_experts
from quatom.benchmark.kernel_operands import (
    OUTLIERS,
    HopperOperands,
    hopper_operands,
    random_activations,
    random_weights,
    relative_error,
)
from quatom.benchmark.kernel_peers import PEERS, Peer
from quatom.benchmark.timing import Timing, copies_to_rotate, time_graph, time_graphs
from quatom.errors import BackendError, RecipeError
from quatom.families.spec import Norm
from quatom.numerics.groups import GroupLayout, ScaleMode
from quatom.ops.activations import MixedTensor, QuantizeSpec
from quatom.ops.backend import Backend
from quatom.ops.gated_quantize import gated_quantize
from quatom.ops.linear import linear, prepare_weights
from quatom.ops.norm_quantize import norm_quantize
from quatom.ops.reorder_quantize import reorder_quantize

SHAPES = ((12288, 4096), (22016, 4096), (4096, 11008), (4096, 4096))
"""(N, K) of Llama-2-7B: fused QKV, fused gate and up, down, output projection."""
TOKENS = (1, 4, 16, 32, 64, 128, 256, 512, 1024, 4096)
PORTABLE_TOKENS = (16, 1024)
"""Where the Triton kernel is measured, on the first shape."""
SCHEMES: tuple[tuple[str, str, ScaleMode], ...] = (
    ("w4a4", "int4", "multiples"),
    ("w4a4-groups", "int4", "group"),
    ("w4a8-fp8-groups", "e4m3", "group"),
    ("w4a8", "int8", "row"),
)
"""(name, activations, their scales); the first and the last are the quatom recipes."""
QUANTIZE_TOKENS = (1, 16, 64, 256, 1024, 4096)
OPS = ("all", "linear", "quantize", "experts")


@dataclass(frozen=True)
class Run:
    """One way to compute a linear layer: what the table calls it, and its calls."""

    scheme: str
    backend: str
    calls: Sequence[Callable[[], object]]
    least_bytes: int
    relative_error: float | None = None

    def entry(
        self, tokens: int, shape: tuple[int, int], timing: Timing, copy_tb_s: float
    ) -> dict[str, Any]:
        """A row of the result file."""
        channels, k = shape
        return {
            "op": "linear",
            "scheme": self.scheme,
            "backend": self.backend,
            "m": tokens,
            "n": channels,
            "k": k,
            "microseconds": round(timing.median_us, 2),
            "p10": round(timing.p10_us, 2),
            "p90": round(timing.p90_us, 2),
            "tops": round(2 * tokens * channels * k / timing.median_us / 1e6, 1),
            "share_of_copy": round(self.least_bytes / copy_tb_s / 1e6 / timing.median_us, 3),
            "relative_error": self.relative_error,
        }


def _own_runs(operands: HopperOperands, tokens: int) -> Iterator[Run]:
    for scheme, fmt, scale_mode in SCHEMES:
        x = operands.activations(tokens, fmt, scale_mode)
        layers = operands.layers(fmt, scale_mode)
        y = linear(x, layers[0])
        error = relative_error(y, x, operands.values, operands.scales)
        least = layers[0].tensors[0].numel() + x.codes.numel() + 2 * y.numel()
        yield Run(scheme, "cuda", [partial(linear, x, layer) for layer in layers], least, error)


def _portable_runs(shape: tuple[int, int], tokens: int) -> Iterator[Run]:
    """The Triton kernel."""
    channels, k = shape
    grouped = GroupLayout(k - OUTLIERS, 128, OUTLIERS)
    whole = GroupLayout(k, k)
    for scheme, weight, fmt, layout in (
        ("w4a4-groups", "int4", "int4", grouped),
        ("w8a8", "int8", "int8", whole),
    ):
        values, scales = random_weights(channels, layout)
        prepared = prepare_weights(
            values,
            scales,
            layout,
            weight_format=weight,
            activation_format=fmt,
            backend=Backend.TRITON,
        )
        x = random_activations(tokens, layout, fmt, "rows")
        error = relative_error(linear(x, prepared), x, values, scales)
        least = sum(t.numel() * t.element_size() for t in prepared.tensors)
        least += x.codes.numel() + 2 * tokens * channels
        yield Run(scheme, "triton", [partial(linear, x, prepared)], least, error)


@dataclass(frozen=True)
class Problem:
    """One shape with the operands of our kernel and of all peers."""

    shape: tuple[int, int]
    operands: HopperOperands
    peers: dict[str, Peer]

    @classmethod
    def make(cls, shape: tuple[int, int]) -> "Problem":
        """Random operands."""
        peers = {scheme: peer for scheme, make in PEERS.items() if (peer := make(*shape))}
        return cls(shape, hopper_operands(*shape), peers)

    def measure(self, tokens: int, copy_tb_s: float) -> Iterator[dict[str, Any]]:
        """Our kernels and the peers in turns."""
        channels, k = self.shape
        runs = list(_own_runs(self.operands, tokens))
        if self.shape == SHAPES[0] and tokens in PORTABLE_TOKENS:
            runs += _portable_runs(self.shape, tokens)
        for scheme, peer in self.peers.items():
            if calls := peer.calls(tokens):
                least = peer.weight_bytes + tokens * (k * peer.input_bytes + 2 * channels)
                runs.append(Run(scheme, "peer", calls, least))
        min_calls = 8 if tokens < 1024 else 2
        timings = time_graphs([run.calls for run in runs], min_calls=min_calls)
        for run, timing in zip(runs, timings, strict=True):
            yield run.entry(tokens, self.shape, timing, copy_tb_s)


_OPTIONAL_KEYS = ("tops", "ratio_bf16", "ratio_humming", "relative_error")
"""Keys that every entry has, null where they mean nothing."""


def _add_ratios(results: list[dict[str, Any]]) -> None:
    """Ratios to cuBLAS BF16 and to the best of humming's A8 variants at the same m, n, k."""

    def best(m: int, n: int, k: int, prefix: str) -> float | None:
        times = [
            r["microseconds"]
            for r in results
            if r.get("n") == n and (r["m"], r["k"]) == (m, k) and r["scheme"].startswith(prefix)
        ]
        return min(times, default=None)

    for row in results:
        if row["op"] != "linear":
            continue
        for key, prefix in (("ratio_bf16", "bf16"), ("ratio_humming", "peer:humming")):
            time = best(row["m"], row["n"], row["k"], prefix)
            row[key] = None if time is None else round(time / row["microseconds"], 2)


def _quantize(copy_tb_s: float, scheme: str, **options: Any) -> Iterator[dict[str, Any]]:
    for k, is_inner in ((4096, False), (8192, False), (11008, True)):
        layout = GroupLayout(k - OUTLIERS, 128, OUTLIERS)
        spec = QuantizeSpec(layout=layout, byte_layout="groups", **options)
        order = torch.randperm(k, device="cuda").int()
        weight = torch.rand(k, device="cuda").half()
        norm = Norm(eps=1e-5)
        for tokens in QUANTIZE_TOKENS:
            out_bytes = tokens * layout.num_scales * (128 + 8)
            copies = copies_to_rotate(tokens * k * 4, most=16)

            def rows(width: int, tokens: int = tokens, copies: int = copies) -> list[Tensor]:
                return [torch.randn(tokens, width, device="cuda").half() for _ in range(copies)]

            calls: dict[str, tuple[int, list[Callable[[], object]]]] = {}
            if is_inner:
                calls["gated_quantize"] = (
                    tokens * k * 4 + out_bytes,
                    [partial(gated_quantize, x, spec, "silu", True) for x in rows(2 * k)],
                )
            else:
                calls["reorder_quantize"] = (
                    tokens * k * 2 + out_bytes,
                    [partial(reorder_quantize, x, order, spec) for x in rows(k)],
                )
                calls["norm_quantize"] = (
                    tokens * k * 6 + out_bytes,
                    [
                        partial(norm_quantize, x, weight, order, spec, norm=norm, residual=r)
                        for x, r in zip(rows(k), rows(k), strict=True)
                    ],
                )
            for op, (least, sequence) in calls.items():
                timing = time_graph(sequence)
                yield {
                    "op": op,
                    "scheme": scheme,
                    "backend": "cuda",
                    "m": tokens,
                    "n": None,
                    "k": k,
                    "microseconds": round(timing.median_us, 2),
                    "p10": round(timing.p10_us, 2),
                    "p90": round(timing.p90_us, 2),
                    "share_of_copy": round(least / copy_tb_s / 1e6 / timing.median_us, 3),
                }


def _reorder_gain(copy_tb_s: float) -> Iterator[dict[str, Any]]:
    """Quantizing reordered channels against gathering scattered outliers at use.

    Without reordering, every linear splits its input first: a gather of the outlier columns and
    one of the others, each quantized by its own kernel. The linear itself is the same.
    """
    channels, k = 4096, 4096
    operands = hopper_operands(channels, k)
    order = torch.randperm(k, device="cuda").int()
    normal, outlier = order[: k - OUTLIERS].long(), order[k - OUTLIERS :].long()
    layer = operands.grouped[0]
    spec = layer.input_spec(QuantizeSpec(layout=operands.layout))
    parts = (
        QuantizeSpec(layout=GroupLayout(k - OUTLIERS, 128), byte_layout="groups"),
        QuantizeSpec(layout=GroupLayout(OUTLIERS, OUTLIERS), byte_layout="groups"),
    )
    for tokens in (16, 256, 4096):
        x = torch.randn(tokens, k, device="cuda").half()
        mixed = reorder_quantize(x, order, spec)

        def reordered(x: Tensor = x) -> Tensor:
            return linear(reorder_quantize(x, order, spec), layer)

        def gathered(x: Tensor = x, mixed: MixedTensor = mixed) -> Tensor:
            reorder_quantize(x[:, normal], None, parts[0])
            reorder_quantize(x[:, outlier], None, parts[1])
            return linear(mixed, layer)

        least = layer.tensors[0].numel() + tokens * (2 * k + 2 * channels)
        runs = [
            Run("w4a4-groups", "cuda", [reordered], least),
            Run("w4a4-groups-gathered", "cuda", [gathered], least),
        ]
        timings = time_graphs([run.calls for run in runs])
        for run, timing in zip(runs, timings, strict=True):
            yield run.entry(tokens, (channels, k), timing, copy_tb_s) | {"op": "quantize+linear"}


def _entries_of_others(path: Path, op: str) -> list[dict[str, Any]]:
    """What a result file holds of operations that `op` does not measure, with its origin."""
    if op == "all" or not path.exists():
        return []
    data = json.loads(path.read_text(encoding="utf-8"))
    origin = {key: data["environment"][key] for key in ("commit", "date")}
    return [origin | entry for entry in data["results"] if _group(entry["op"]) != op]


def _group(op: str) -> str:
    """The choice of `OPS` that measures an operation."""
    return "linear" if "linear" in op else "quantize" if op.endswith("_quantize") else op


def run_kernel_bench(
    op: str = "all", json_path: Path | None = None, plot_path: Path | None = None
) -> list[dict[str, Any]]:
    """Measure the kernels on the current GPU, and write a result file and a plot.

    The result file is written after every problem: an interrupted run keeps what it has. What the
    file holds of other operations stays.

    Args:
        op: all, linear, quantize or experts.
        json_path: result file.
        plot_path: picture of the linear results.

    Raises:
        RecipeError: there is no such op.
        BackendError: there is no Hopper GPU.
    """
    if op not in OPS:
        raise RecipeError(f"unknown benchmark op {op!r}; known: {', '.join(OPS)}")
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        raise BackendError(
            "the kernel benchmark measures the Hopper kernels: it needs an sm_90 GPU"
        )
    ceilings = measure_ceilings()
    environment = describe_environment() | ceilings
    origin = {"commit": environment["commit"], "date": environment["date"]}
    kept = _entries_of_others(json_path, op) if json_path else []
    results: list[dict[str, Any]] = []
    parts: list[Iterator[dict[str, Any]]] = []
    copy = ceilings["copy_tb_s"]
    if op in ("all", "quantize"):
        parts.append(_quantize(copy, "int4-groups", clip_ratio=0.9))
        parts.append(_quantize(copy, "int4", clip_ratio=0.95, scale_mode="multiples"))
        parts.append(_quantize(copy, "int8", normal="int8", scale_mode="row"))
    if op in ("all", "linear"):
        parts.append(_reorder_gain(copy))
        problems = [Problem.make(shape) for shape in SHAPES]
        # Fewest tokens first: the work that heats the GPU most comes last.
        parts += [problem.measure(m, copy) for m in TOKENS for problem in problems]
    experts = measure_experts(copy) if op in ("all", "experts") else iter(())
    for part in chain(parts, experts):
        rows = [dict.fromkeys(_OPTIONAL_KEYS) | row | origin for row in part]
        _add_ratios(rows)
        results += rows
        torch.cuda.empty_cache()
        if json_path:
            command = f"quatom bench kernels --op {op} --json {json_path.name}"
            write_results(json_path, command, environment, kept + results)
    if plot_path:
        from quatom.benchmark.kernel_plot import plot_kernels

        plot_kernels(results, environment, plot_path)
    return results


if __name__ == "__main__":
    import sys

    run_kernel_bench(json_path=Path(sys.argv[1]) if sys.argv[1:] else None)
