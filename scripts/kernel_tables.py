"""Tables of kernel results: kernels-GPU.json and attention-GPU.json."""

from collections.abc import Iterable
from typing import Any

from result_files import NOT_MEASURED, origin, read, table

SHOWN = (1, 16, 64, 256, 1024, 4096)
"""Numbers of tokens that the tables of linear layers and experts show."""
BESIDE = "ratios: time of the other over Quatom's, in one run"


def attention(name: str) -> str:
    """Decode attention over the INT4 cache, the fastest backend, beside cuDNN in BF16."""
    data = read(name)
    best: dict[tuple[Any, ...], dict[str, Any]] = {}
    for e in data["results"]:
        shape = (e["num_heads"], e["num_kv_heads"], e["head_dim"], e["length"], e["batch"])
        if (e["op"], e["kv"], e["new_tokens"], e["head_dim"]) != ("decode", "int4", 1, 128):
            continue
        if e["ratio_cudnn_bf16"] is None:
            continue
        if shape not in best or e["microseconds"] < best[shape]["microseconds"]:
            best[shape] = e
    rows = [
        [
            f"{e['batch']} x {e['length']}, {e['num_heads']}/{e['num_kv_heads']} heads",
            f"{e['microseconds']:.1f}",
            _percent(e["share_of_copy"]),
            _times(e["ratio_cudnn_bf16"]),
            _times(e["ratio_flash_bf16"]),
        ]
        for _, e in sorted(best.items(), reverse=True)
    ]
    header = ["batch x length", "us", "share of copy bandwidth"]
    header += ["cuDNN BF16", "FlashAttention BF16"]
    return f"{_where(data, best.values())}; {BESIDE}:\n\n" + table(header, rows)


def prefill(name: str) -> str:
    """Prefill attention over the INT4 cache, beside cuDNN and FlashAttention in BF16."""
    data = read(f"attention-{name.partition('-')[2]}")
    shown = [
        e
        for e in data["results"]
        if (e["op"], e["kv"], e["backend"]) == ("prefill", "int4", "cuda")
        and e["ratio_cudnn_bf16"] is not None
    ]
    if not shown:
        return NOT_MEASURED
    rows = [
        [
            f"{e['new_tokens']} + {e['length'] - e['new_tokens']}, "
            f"{e['num_heads']}/{e['num_kv_heads']} heads",
            f"{e['microseconds']:.1f}",
            _times(e["ratio_cudnn_bf16"]),
            _times(e["ratio_flash_bf16"]),
        ]
        for e in shown
    ]
    header = ["new + cached tokens", "us", "cuDNN BF16", "FlashAttention BF16"]
    return f"{_where(data, shown)}; {BESIDE}:\n\n" + table(header, rows)


def kernels(name: str) -> str:
    """W4A4 and W4A8 on Hopper beside cuBLAS BF16 and the best public kernel for the job."""
    data = read(name)
    own = {
        (e["n"], e["k"], e["m"], e["scheme"]): e
        for e in data["results"]
        if e["op"] == "linear" and e["backend"] == "cuda" and e["m"] in SHOWN
    }
    schemes = ("w4a4", "w4a8")
    problems = {key[:3] for key in own if key[3] in schemes}
    if not problems:
        return NOT_MEASURED
    rows = []
    for n, k, m in sorted(problems, key=lambda p: (-p[0] * p[1], p[0], p[2])):
        row = [f"{n} x {k}, M = {m}"]
        for scheme in schemes:
            e = own.get((n, k, m, scheme))
            row += [""] * 5 if e is None else _linear_cells(e)
        rows.append(row)
    header = ["N x K, tokens"]
    for title in ("W4A4", "W4A8"):
        header += [f"{title}: us", "share of copy", "TOPS", "BF16", "humming"]
    return (
        f"{_where(data, own.values())}; INT8 outliers and all scales included, W4A8 with INT8 and "
        "one scale per token; ratios: time of cuBLAS BF16 and of humming's A8 over Quatom's, in "
        "one run:\n\n" + table(header, rows)
    )


def _linear_cells(e: dict[str, Any]) -> list[str]:
    return [
        f"{e['microseconds']:.1f}",
        _percent(e["share_of_copy"]),
        f"{e['tops']:.0f}",
        _times(e["ratio_bf16"]),
        _times(e["ratio_humming"]),
    ]


def fused(name: str) -> str:
    """The kernels around the linear layers, and what reordering brings over gathering outliers."""
    data = read(f"kernels-{name.partition('-')[2]}")
    shown = [
        e
        for e in data["results"]
        if "quantize" in e["op"] and e["backend"] == "cuda" and e["m"] in (1, 16, 64, 256, 4096)
    ]
    rows = [
        [
            f"{e['op'].replace('_', ' ')}, {e['scheme']}",
            f"{e['k']}",
            f"{e['m']}",
            f"{e['microseconds']:.1f}",
            _percent(e["share_of_copy"]) if e["op"].endswith("_quantize") else "",
        ]
        for e in shown
    ]
    if not rows:
        return NOT_MEASURED
    header = ["operation", "K", "M", "us", "share of copy"]
    return f"{_where(data, shown)}:\n\n" + table(header, rows)


def experts(name: str) -> str:
    """Products of routed experts beside the dense kernel at equal work and a grouped product."""
    data = read(f"kernels-{name.partition('-')[2]}")
    shown = [
        e
        for e in data["results"]
        if e["op"] == "experts" and e["backend"] == "cuda" and e.get("ratio_dense") is not None
    ]
    rows = [
        [
            f"{e['model']}, {e['scheme']}",
            f"{e['tokens']}",
            f"{e['microseconds']:.1f}",
            _percent(e["share_of_copy"]),
            _times(e["ratio_dense"]),
            _times(e["ratio_bf16"]),
        ]
        for e in shown
    ]
    if not rows:
        return NOT_MEASURED
    header = ["layer, scheme", "tokens", "us", "share of copy"]
    header += ["rate over the dense kernel's", "BF16 grouped"]
    return f"{_where(data, shown)}; {BESIDE}:\n\n" + table(header, rows)


def _where(data: dict[str, Any], entries: Iterable[dict[str, Any]]) -> str:
    copy = data["environment"]["copy_tb_s"]
    return f"{origin(data, entries)}, copy {copy} TB/s"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


KERNEL_TABLES = {
    "attention": attention,
    "experts": experts,
    "fused": fused,
    "kernels": kernels,
    "prefill": prefill,
}
