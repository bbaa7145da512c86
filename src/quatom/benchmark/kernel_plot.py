"""Picture of a kernel result file: throughput of dense layers over tokens, with the roofline."""

from pathlib import Path
from typing import Any

SERIES = (
    ("w4a4", "cuda", "Quatom W4A4 (INT8 outliers)", "tab:red", "o"),
    ("w4a8", "cuda", "Quatom W4A8 (INT8 outliers)", "tab:orange", "s"),
    ("w4a4-groups", "cuda", "W4A4, free scales per group", "tab:olive", "."),
    ("peer:humming-w4a8-fp8", "peer", "humming W4A8 FP8", "tab:blue", "^"),
    ("peer:humming-w4a8-int8", "peer", "humming W4A8 INT8", "tab:cyan", "v"),
    ("peer:fp8-no-groups", "peer", "cuBLASLt FP8, no groups", "tab:gray", "x"),
    ("bf16", "peer", "cuBLAS BF16", "black", "d"),
)
_WEIGHT_BYTES = 4.25 / 8
"""Bytes of an INT4 weight with its group's scale."""


def plot_kernels(
    results: list[dict[str, Any]], environment: dict[str, Any], path: Path, columns: int = 2
) -> None:
    """Draw one panel a shape: TOPS over tokens, and what memory and matrix unit allow W4A4."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in results if row["op"] == "linear"]
    shapes = sorted({(row["n"], row["k"]) for row in rows}, reverse=True)
    lines = -(-len(shapes) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(5.2 * columns, 3.8 * lines), squeeze=False, sharex=True
    )
    for axis, (n, k) in zip(axes.flat, shapes, strict=False):
        tokens = sorted({row["m"] for row in rows if (row["n"], row["k"]) == (n, k)})
        for scheme, backend, label, color, marker in SERIES:
            points = sorted(
                (row["m"], row["tops"])
                for row in rows
                if (row["n"], row["k"], row["scheme"], row["backend"]) == (n, k, scheme, backend)
            )
            if points:
                axis.plot(*zip(*points, strict=True), marker=marker, label=label, color=color)
        least_bytes = {m: n * k * _WEIGHT_BYTES + m * (k + 2 * n) for m in tokens}
        roof = [
            min(
                2 * m * n * k / least_bytes[m] * environment["copy_tb_s"],
                environment["fp8_tflops"],
            )
            for m in tokens
        ]
        axis.plot(tokens, roof, linestyle="--", color="tab:red", alpha=0.5, label="W4A4 roofline")
        axis.set(xscale="log", yscale="log", title=f"N = {n}, K = {k}", xlabel="tokens")
        axis.grid(visible=True, which="both", alpha=0.3)
        axis.set_ylabel("TOPS")
    axes[0][0].legend(fontsize=7)
    figure.suptitle(f"Throughput of a dense layer, {environment.get('gpu', 'GPU')}")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
