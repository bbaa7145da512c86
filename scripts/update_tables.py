"""Rewrite the tables in README.md and docs/ from the JSON files in benchmarks/results.

A table stands between `<!-- table NAME -->` and `<!-- end -->`; NAME is a function below. Run with
--check to fail instead of writing where a table is out of date.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MARK = re.compile(r"(<!-- table ([\w.-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
RECIPE_ORDER = (
    "fp16",
    "w8a8",
    "w4a16",
    "rtn-w4a4",
    "atom-w4a4kv4",
    "quatom-w4a4kv4",
    "atom-w4a8kv4",
    "quatom-w4a8kv4",
    "atom-fp4",
    "atom-w3a3",
)


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; all columns but the first align to the right."""
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def read(name: str) -> dict[str, Any]:
    """A result file by its name without .json."""
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return content


def accuracy(name: str) -> str:
    """Perplexity and bits of every recipe in an accuracy file, a table for each set of windows."""
    data = read(name)
    environment = data["environment"]
    parts = []
    settings = sorted({(e["corpus"], e["windows"], e["sequence_length"]) for e in data["results"]})
    for corpus, windows, length in settings:
        entries = [
            e
            for e in data["results"]
            if (e["corpus"], e["windows"], e["sequence_length"]) == (corpus, windows, length)
        ]
        entries.sort(key=lambda e: _rank(e["recipe"]))
        rows = [
            [
                "float" if e["recipe"] == "fp16" else f"`{e['recipe']}`",
                f"{e['perplexity']:.2f}",
                "" if not e["float_perplexity"] else _increase(e),
                "" if e["recipe"] == "fp16" else f"{e['bits_per_weight']:.2f}",
                "" if e["recipe"] == "fp16" else f"{e['bits_per_activation']:.2f}",
                "" if e["recipe"] == "fp16" else f"{e['bits_per_kv']:.2f}",
            ]
            for e in entries
        ]
        header = ["recipe", "perplexity", "increase", "bits/weight", "bits/activation", "bits/KV"]
        which = "all" if entries[0]["all_windows"] else "first"
        parts.append(
            f"{entries[0]['model']}, {corpus}, {which} {windows} windows of {length} tokens "
            f"({environment['cpu']}, torch {environment['torch']}):\n\n{table(header, rows)}"
        )
    return "\n".join(parts)


def _rank(recipe: str) -> tuple[int, str]:
    known = RECIPE_ORDER.index(recipe) if recipe in RECIPE_ORDER else len(RECIPE_ORDER)
    return known, recipe


def _increase(entry: dict[str, Any]) -> str:
    if entry["recipe"] == "fp16":
        return ""
    return f"+{entry['perplexity'] - entry['float_perplexity']:.2f}"


def quantize(name: str) -> str:
    """Time and memory of quantizing."""
    rows = [
        [
            e["model"],
            f"`{e['recipe']}`",
            f"{e['samples']} x {e['sequence_length']}",
            f"{e['seconds']:.0f}",
            f"{e['peak_rss_gb']:.2f}",
            f"{e['checkpoint_bytes'] / 1e6:.1f}",
        ]
        for e in read(name)["results"]
    ]
    return table(["model", "recipe", "calibration", "seconds", "peak RSS (GB)", "size (MB)"], rows)


def engine(name: str) -> str:
    """The engine's own time per step."""
    rows = [
        [
            f"{e['sampling']}, {e['sequences']} sequences",
            f"{e['ms_per_step']:.2f}",
            f"{e['p10']:.2f}",
            f"{e['p90']:.2f}",
            f"{e['cpu_ms_per_step']:.2f}",
        ]
        for e in read(name)["results"]
    ]
    return table(["sampling", "ms a step", "p10", "p90", "CPU ms (median)"], rows)


def decode(name: str) -> str:
    """Our engine against transformers on a CPU."""
    rows = [
        [
            f"`{e['recipe']}`, batch {e['batch']}",
            f"{e['tokens_per_s']:.2f}",
            f"{e['transformers_tokens_per_s']:.2f}",
            f"{e['ratio']:.2f}",
        ]
        for e in read(name)["results"]
    ]
    return table(["SmolLM2-135M", "tokens/s", "transformers float32, tokens/s", "ratio"], rows)


def ablation(name: str) -> str:
    """Rungs of every ladder in an ablation file, each beside what it adds."""
    data = read(name)
    entries = data["results"]
    parts = []
    for ladder in dict.fromkeys(e["ladder"] for e in entries if e["rung"] != "float"):
        floats = [e for e in entries if e["rung"] == "float"]
        rungs = floats[:1] + [e for e in entries if e["ladder"] == ladder and e not in floats]
        first = rungs[-1]
        rows = [[e["rung"].replace("_", " "), f"{e['perplexity']:.2f}"] for e in rungs]
        parts.append(
            f"{first['model']}, {first['corpus']}, {first['windows']} windows of "
            f"{first['sequence_length']} tokens, calibrated on {first['calibration']}, ladder "
            f"`{ladder}`:\n\n{table(['rung', 'perplexity'], rows)}"
        )
    return "\n".join(parts)


def attention(name: str) -> str:
    """Decode attention over the INT4 cache, the fastest backend, beside cuDNN in BF16."""
    data = read(name)
    environment = data["environment"]
    best: dict[tuple[Any, ...], dict[str, Any]] = {}
    for e in data["results"]:
        shape = (e["num_heads"], e["num_kv_heads"], e["head_dim"], e["length"], e["batch"])
        wanted = e["op"] == "decode" and e["kv"] == "int4" and e["new_tokens"] == 1
        if not wanted or e["head_dim"] != 128 or e["ratio_cudnn_bf16"] is None:
            continue
        if shape not in best or e["microseconds"] < best[shape]["microseconds"]:
            best[shape] = e
    rows = [
        [
            f"{e['batch']} x {e['length']}, {e['num_heads']}/{e['num_kv_heads']} heads",
            f"{e['microseconds']:.1f}",
            f"{100 * e['share_of_copy']:.0f} %",
            f"{e['ratio_cudnn_bf16']:.2f}x",
            f"{e['ratio_flash_bf16']:.2f}x",
        ]
        for _, e in sorted(best.items(), reverse=True)
    ]
    header = ["batch x length", "us", "of copy bandwidth", "cuDNN BF16", "FlashAttention BF16"]
    return (
        f"{environment['gpu']}, copy {environment['copy_tb_s']} TB/s, torch "
        f"{environment['torch']}; ratios: time of the other over ours, in one run:\n\n"
        + table(header, rows)
    )


def kernels(name: str) -> str:
    """The W4A4 linear on Hopper beside cuBLAS BF16 and the best public kernel for the job."""
    data = read(name)
    environment = data["environment"]
    shown = (1, 16, 64, 256, 1024, 4096)
    wanted = [
        e
        for e in data["results"]
        if (e["op"], e["scheme"], e["backend"]) == ("linear", "w4a4", "cuda") and e["m"] in shown
    ]
    rows = [
        [
            f"{e['n']} x {e['k']}, M = {e['m']}",
            f"{e['microseconds']:.1f}",
            f"{100 * e['share_of_copy']:.0f} %",
            f"{e['tops']:.0f}",
            f"{e['ratio_bf16']:.2f}x",
            "" if e["ratio_humming"] is None else f"{e['ratio_humming']:.2f}x",
        ]
        for e in sorted(wanted, key=lambda e: (-e["n"] * e["k"], e["n"], e["m"]))
    ]
    header = ["N x K, tokens", "us", "of copy bandwidth", "TOPS", "cuBLAS BF16", "humming A8"]
    return (
        f"{environment['gpu']}, copy {environment['copy_tb_s']} TB/s, torch "
        f"{environment['torch']}; INT8 outliers and all scales included; ratios: time of the other "
        f"over ours, in one run:\n\n" + table(header, rows)
    )


TABLES: dict[str, Callable[[str], str]] = {
    "ablation": ablation,
    "accuracy": accuracy,
    "attention": attention,
    "decode": decode,
    "engine": engine,
    "kernels": kernels,
    "quantize": quantize,
}


def render(text: str) -> str:
    """The text with every table made anew from its result file."""

    def replace(match: re.Match[str]) -> str:
        name = match.group(2)
        return match.group(1) + "\n" + TABLES[name.split("-")[0]](name) + "\n" + match.group(3)

    return MARK.sub(replace, text)


def main() -> int:
    """Update all files, or with --check report the ones that are out of date."""
    stale = []
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        text = path.read_text(encoding="utf-8")
        new = render(text)
        if new != text:
            stale.append(path.relative_to(ROOT))
            if "--check" not in sys.argv:
                path.write_text(new, encoding="utf-8")
    for path in stale:
        print(f"{path}: tables {'are out of date' if '--check' in sys.argv else 'updated'}")
    return int(bool(stale) and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
