"""Sections of the report on checkpoints: where their bits lie, what a GPU could do with them."""

import math

from quatom.benchmark.memory_plan import GIB, find_gpu, plan_memory
from quatom.benchmark.roofline import Roofline
from quatom.checkpoint.schema import bits_by_linear
from quatom.evaluation.report_charts import Series, bar_chart
from quatom.evaluation.report_model import Part, ReportInputs, Section, Table, number
from quatom.plan import ModelPlan

CONTEXT = 2048
"""Cached tokens of each sequence whose decode step is computed."""
BATCHES = (1, 64)
"""Sequences that are decoded together."""


def bits_section(inputs: ReportInputs) -> Section | None:
    """Bits per weight and size of every linear, over all blocks."""
    parts = []
    for layer in inputs.layers:
        if layer.plan is None:
            continue
        kinds = _bits_by_kind(layer.plan)
        rows = [
            [kind, _spread([b for b, _ in found]), number(_megabytes(found), 1)]
            for kind, found in kinds.items()
        ]
        every = [entry for found in kinds.values() for entry in found]
        mean = sum(b * count for b, count in every) / sum(count for _, count in every)
        rows.append(["all", number(mean, 3), number(_megabytes(every), 1)])
        values = [sum(b for b, _ in found) / len(found) for found in kinds.values()]
        chart = bar_chart(
            f"Bits per weight of {layer.name}", list(kinds), Series(layer.name, values), "bits"
        )
        parts.append(Part(title=layer.name, chart=chart))
        note = f"{len(layer.plan.layers)} blocks together."
        header = ("linear", "bits per\nweight", "size, MB")
        parts.append(Part(table=Table(header, rows, note)))
    if not parts:
        return None
    text = (
        "What is stored for each weight of a linear: codes, scales, outlier channels and their "
        "order. Embeddings, output head and norms are not part of it."
    )
    return Section("bits", "Bits per layer", text, parts)


def expected_section(inputs: ReportInputs) -> Section | None:
    """Memory and the limit of decoding on each GPU that the user named."""
    rows = []
    for layer in inputs.layers:
        for name in inputs.gpus if layer.plan is not None else ():
            assert layer.plan is not None
            rows.append([f"{layer.name}\n{name}", *_on_gpu(layer.plan, name)])
    if not rows:
        return None
    header = (
        "checkpoint\nand GPU",
        "weights,\nGiB",
        "KV cache,\nKiB per token",
        "tokens\nin the cache",
        *(f"limit, tokens/s\n{size} sequence{'s' if size > 1 else ''}" for size in BATCHES),
    )
    text = (
        "Computed, not measured. The limit is the roofline of decoding with "
        f"{CONTEXT} cached tokens per sequence: the least time for the bytes that are read and the "
        "products that are computed, at the bandwidth and matrix rates of the GPU's data sheet. "
        "Real throughput is lower; quatom bench throughput measures it."
    )
    return Section("expected", "Expected on a GPU", text, [Part(table=Table(header, rows))])


def _on_gpu(plan: ModelPlan, name: str) -> list[str]:
    gpu = find_gpu(name)
    memory = plan_memory(plan.config, plan.recipe, gpu.memory_gib)
    assert gpu.ceilings is not None
    roofline = Roofline.of(plan, gpu.ceilings)
    cells = [
        number(memory.weight_bytes / GIB),
        number(memory.kv_bytes_per_token / 1024, 1),
        f"{memory.kv_tokens:,}" if memory.fits else "does not fit",
    ]
    for size in BATCHES:
        fits = memory.sequences(CONTEXT) >= size
        rate = size / roofline.decode_step(size, CONTEXT)
        cells.append(f"{rate:,.0f}" if fits else "does not fit")
    return cells


def _bits_by_kind(plan: ModelPlan) -> dict[str, list[tuple[float, int]]]:
    """(bits per weight, weights) in every block, by the name of a linear within its block."""
    bits = bits_by_linear(plan)
    kinds: dict[str, list[tuple[float, int]]] = {}
    for layer in plan.layers:
        for site in layer.sites.values():
            for linear in site.linears:
                entry = (bits[linear.name], math.prod(linear.shape))
                kinds.setdefault(linear.kind, []).append(entry)
    return kinds


def _megabytes(found: list[tuple[float, int]]) -> float:
    return math.fsum(bits * count for bits, count in found) / 8e6


def _spread(values: list[float]) -> str:
    low, high = min(values), max(values)
    return number(low, 3) if low == high else f"{low:.3f} to {high:.3f}"
