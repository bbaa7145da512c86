"""Rewrite the tables in README.md and docs/ from benchmarks/results and from the code.

A table is between `<!-- table NAME -->` and `<!-- end -->`. NAME is a function below and the rest
of a result file's name, or one in a module *_tables.py beside this file. `times` takes the H200's
results where there are any, else the H100's.
Run with --check to fail instead of writing where a table is out of date.
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quatom.families.refused import REFUSED
from quatom.families.registry import FAMILIES

sys.path.insert(0, str(Path(__file__).parent))  # also when a test runs this file by its path

from accuracy_tables import ACCURACY_TABLES
from code_tables import CODE_TABLES
from kernel_tables import KERNEL_TABLES
from ladder_tables import LADDER_TABLES
from result_files import (
    GPUS,
    NOT_MEASURED,
    RESULTS,
    ROOT,
    exists,
    label,
    machine,
    machines,
    origin,
    rank,
    read,
    table,
)
from serving_tables import SERVING_TABLES

MARK = re.compile(r"(<!-- table ([\w.-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def backends(name: str) -> str:
    """Perplexity of the same checkpoints and windows through several backends and dtypes."""
    data = read(name.partition("-")[2])
    first = data["results"][0]

    def order(e: dict[str, Any]) -> tuple[Any, ...]:  # what others are compared with comes first
        dtype = e.get("dtype", "float32")
        return *rank(e["recipe"]), e["backend"] != "reference", dtype != "float32", dtype

    entries = sorted(data["results"], key=order)
    rows = []
    for e in entries:
        reference = next(r for r in entries if r["recipe"] == e["recipe"])
        change = e["perplexity"] / reference["perplexity"] - 1
        shown = "" if e is reference else f"{100 * change:+.2f} %"
        backend = f"{e['backend']}, {e['dtype']}" if "dtype" in e else e["backend"]
        rows.append([label(e["recipe"]), backend, f"{e['perplexity']:.3f}", shown])
    return (
        f"{first['model']}, {first['corpus']}, {first['windows']} windows of "
        f"{first['sequence_length']} tokens ({machine(data)}):\n\n"
    ) + table(["recipe", "backend", "perplexity", "from the reference"], rows)


def quantize(name: str) -> str:
    """Time and memory of quantizing."""
    rows = [
        [
            e["model"],
            f"`{e['recipe']}`",
            f"{e['samples']} x {e['sequence_length']}",
            f"{e['seconds']:.0f}",
            f"{e['peak_rss_gb']:.2f}",
            f"{e['peak_gpu_gb']:.2f}" if e["peak_gpu_gb"] else "",
            f"{e['checkpoint_bytes'] / 1e6:.1f}",
        ]
        for e in read(name)["results"]
    ]
    header = ["model", "recipe", "calibration", "seconds", "peak RSS (GB)", "GPU (GB)", "size (MB)"]
    return table(header, rows)


def times(name: str) -> str:
    """Time of quantizing by machine: each model and recipe on the first machine that has it."""
    shown: dict[tuple[str, str, bool], list[str]] = {}
    for where in (*GPUS, "cpu"):
        if not exists(f"quantize-{where}"):
            continue
        data = read(f"quantize-{where}")
        for e in data["results"]:
            key = e["model"], e["recipe"], where == "cpu"
            shown.setdefault(
                key,
                [
                    e["model"],
                    f"`{e['recipe']}`",
                    machines(data, [e]),
                    f"{e['samples']} x {e['sequence_length']}",
                    f"{e['seconds']:.0f}",
                    f"{e['peak_rss_gb']:.1f}",
                    f"{e['peak_gpu_gb']:.1f}" if e["peak_gpu_gb"] else "",
                ],
            )
    header = ["model", "recipe", "machine", "calibration", "seconds", "memory (GB)", "GPU (GB)"]
    rows = sorted(shown.items(), key=lambda item: (item[0][2], item[0][0], rank(item[0][1])))
    return table(header, [row for _, row in rows])


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
    return table(["sampling", "ms per step", "p10", "p90", "CPU ms (median)"], rows)


def overhead(name: str) -> str:
    """CPU time of a served token without the model, by process."""
    rows = [
        [
            f"in a {e['engine']}{' of its own' * (e['engine'] == 'process')}",
            f"{e['server_us_per_token']:.0f}",
            "" if e["engine_us_per_token"] is None else f"{e['engine_us_per_token']:.0f}",
            f"{e['output_tokens_per_s']:.0f}",
        ]
        for e in read(name)["results"]
    ]
    header = ["engine", "us per token, server", "us per token, engine's process", "tokens/s"]
    return table(header, rows)


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


def agreement(name: str) -> str:
    """`quatom agree`: choices of tokens held against the reference's."""
    data = read(name)
    rows = [
        [
            label(e["recipe"]),
            f"{e['backend']}, {e['device']}, {e['dtype']}",
            f"{e['prompts']} x {e['tokens_each']}",
            f"{100 * e['share']:.2f} %",
            f"{e['mean_gap']:.2f}",
            f"{e['noise']:.2f}",
            f"{e['unexplained']}",
            "yes" if e["repeatable"] else "no",
        ]
        for e in sorted(data["results"], key=lambda e: rank(e["recipe"]))
    ]
    header = ["recipe", "what is compared", "prompts x tokens", "same choice"]
    header += ["mean gap where not", "noise", "beyond noise", "same twice"]
    return f"{data['results'][0]['model']}, {machine(data)}:\n\n" + table(header, rows)


def families(name: str) -> str:
    """What `scripts/verify_families.py` found of every family on one machine."""
    if not (RESULTS / f"{name}.json").exists():
        return "Not measured yet.\n"
    data = read(name)
    rows, missing = [], []
    for family in FAMILIES:
        entries = [e for e in data["results"] if e["family"] == family.name]
        if not entries:
            missing.append(f"`{family.name}`")
            continue
        floats = [e for e in entries if e["recipe"] == "fp16"]
        packed = [e for e in entries if e["recipe"] != "fp16" and "refused" not in e]
        rows.append(
            [
                f"`{family.name}`",
                ", ".join(sorted({e["model"] for e in floats})),
                *(_worst([e for e in floats if e["dtype"] == d]) for d in _dtypes(data)),
                ", ".join(sorted({f"`{e['recipe']}`" for e in packed})),
                _worst(packed, "rms"),
            ]
        )
    header = ["family", "tiny models"]
    header += [f"{dtype} to transformers, largest" for dtype in _dtypes(data)]
    rest = f"\nNot measured there: {', '.join(missing)}.\n" if missing else ""
    return f"On {machine(data)}:\n\n" + table([*header, "recipes", "packed, rms"], rows) + rest


def supported(name: str) -> str:
    """Families and architectures, from the registry; `name` is not used."""
    rows = [
        [f"`{family.name}`", ", ".join(f"`{a}`" for a in family.architectures), family.models]
        for family in FAMILIES
    ]
    return table(["family", "architectures", "released models"], rows)


def family_names(name: str) -> str:
    """Names of the families, in one paragraph; `name` is not used."""
    return ", ".join(f"`{family.name}`" for family in FAMILIES) + ".\n"


def refused(name: str) -> str:
    """Models that do not run, by what they have; `name` is not used."""
    reasons: dict[str, list[str]] = {}
    for model, reason in REFUSED.items():
        reasons.setdefault(reason, []).append(f"`{model}`")
    rows = [
        [reason, ", ".join(n for n in names if "For" in n)] for reason, names in reasons.items()
    ]
    return table(["it has", "architectures"], rows)


def _dtypes(data: dict[str, Any]) -> list[str]:
    """Dtypes of the floating-point models of a families file."""
    return list(dict.fromkeys(e["dtype"] for e in data["results"] if e["recipe"] == "fp16"))


def _worst(entries: list[dict[str, Any]], measure: str = "largest") -> str:
    """The largest distance of several results, prompts and decodes alike."""
    found = [entry[part][measure] for entry in entries for part in ("prompt", "decode")]
    return f"{max(found):.1e}" if found else "-"


def vllm(name: str) -> str:
    """Throughput of vLLM with the plugin and without, and of Quatom's engine.

    The engine's rows are those of serving-MACHINE.json where this file has none of its own.
    Machines of several GPUs have that file alone.
    """
    keys = ("model", "recipe", "gpu_memory_gb", "workload", "requests")
    serving = f"serving-{name.partition('-')[2]}"
    data = read(name if exists(name) else serving)
    entries = list(data["results"])
    if exists(name) and exists(serving) and all("engine" in entry for entry in entries):
        wanted = {tuple(entry[key] for key in keys) for entry in entries}
        entries += [e for e in read(serving)["results"] if tuple(e[key] for key in keys) in wanted]
    engines = {"vllm+quatom": "vLLM {} with the plugin", "vllm": "vLLM {}"}
    rows = [
        [
            engines.get(e.get("engine", ""), "Quatom's engine").format(e.get("vllm")),
            e["model"],
            "FP8, FP8 KV cache" if e["recipe"] == "fp8" else label(e["recipe"]),
            f"{e.get('tensor_parallel', 1)}",
            f"{e['gpu_memory_gb']:g}",
            f"{e['requests']} of {e['workload']}",
            f"{e['output_tokens_per_s']:.0f}",
        ]
        for e in sorted(entries, key=lambda e: (e["model"], e["output_tokens_per_s"]))
    ]
    header = ["engine", "shape", "format", "GPUs", "GiB", "requests", "output tokens/s"]
    return f"{origin(data, entries)}, random weights.\n\n{table(header, rows)}"


TABLES: dict[str, Callable[..., str]] = {
    "families": families,
    "supported": supported,
    "names": family_names,
    "refused": refused,
    "agreement": agreement,
    "backends": backends,
    "decode": decode,
    "engine": engine,
    "overhead": overhead,
    "quantize": quantize,
    "times": times,
    "vllm": vllm,
    **ACCURACY_TABLES,
    **CODE_TABLES,
    **KERNEL_TABLES,
    **LADDER_TABLES,
    **SERVING_TABLES,
}


def render(text: str) -> str:
    """The text with every table made anew from its result file."""

    def replace(match: re.Match[str]) -> str:
        name = match.group(2)
        try:
            made = TABLES[name.split("-")[0]](name)
        except FileNotFoundError:
            if not name.endswith(f"-{GPUS[0]}"):
                raise
            made = NOT_MEASURED  # pages have places for that GPU's results before they are there
        return match.group(1) + "\n" + made + "\n" + match.group(3)

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
