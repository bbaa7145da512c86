"""Tables of docs/lab/performance.md from serving results, and from none."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from quatom.benchmark.serving_results import make_entry

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "update_tables.py"
LATENCY = {"p50": 1500.0, "p90": 1600.0, "p99": 1700.0}


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """The script's tables over a folder of its own."""
    module = runpy.run_path(str(SCRIPT))
    monkeypatch.setattr(sys.modules["result_files"], "RESULTS", tmp_path)
    return module["TABLES"] | {"render": module["render"]}


def entry(mode, recipe, rate, **more):
    given = dict(
        gpu_memory_gb=24.0,
        workload="1024+512",
        requests=64,
        kv_tokens=19968,
        mean_running=12.3,
        max_running=16,
        output_tokens_per_s=rate,
        ttft_ms=LATENCY,
        tpot_ms=LATENCY,
        itl_ms=LATENCY,
        e2e_ms=LATENCY,
        share_of_limit=0.456,
        errors=0,
    )
    return make_entry(mode=mode, model="llama-2-7b", recipe=recipe, **(given | more))


def write(folder, entries):
    environment = {"gpu": "a GPU", "torch": "2.11.0", "commit": "c0ffee", "date": "2026-11-01"}
    content = {"environment": environment, "results": entries}
    (folder / "serving-x.json").write_text(json.dumps(content))


def rows(text):
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("| ")
    ][1:]


def test_without_a_file_there_is_no_table(tables):
    for name in ("throughput", "batches", "load"):
        page = f"<!-- table {name}-h200 -->\n<!-- end -->"
        assert "Not measured yet." in tables["render"](page)


def test_runs_stand_beside_float_at_the_same_memory(tables, tmp_path):
    write(
        tmp_path,
        [
            entry("throughput", "atom-w4a4kv4", 6500.0, requests=160),
            entry("throughput", "fp16", 1300.0),
            entry("throughput", "fp16", 2800.0, gpu_memory_gb=72.0),
            entry("latency", "atom-w4a4kv4", 400.0, requests=1, tpot_ms=None),
            entry("throughput", "w8a8", 2000.0, gpu_memory_gb=40.0),
        ],
    )
    text = tables["throughput"]("throughput-x")
    assert text.startswith("a GPU, torch 2.11.0, commit c0ffee (2026-11-01); random weights")
    got = rows(text)
    assert [row[:3] for row in got] == [
        ["1 x 1024+512, 24 GiB, `atom-w4a4kv4`", "400", ""],
        ["64 x 1024+512, 24 GiB, `fp16`", "1300", "1.00x"],
        ["160 x 1024+512, 24 GiB, `atom-w4a4kv4`", "6500", "5.00x"],
        ["64 x 1024+512, 40 GiB, `w8a8`", "2000", ""],
        ["64 x 1024+512, 72 GiB, `fp16`", "2800", "1.00x"],
    ]
    assert got[1][3:] == ["12 / 16", "19,968", "1500", "1500.0", "1.50", "46 %"]


def test_batches_are_compared_at_equal_batch_and_at_equal_memory(tables, tmp_path):
    write(
        tmp_path,
        [
            entry("batch", "fp16", 100.0, batch=8, comparison="equal batch"),
            entry("batch", "atom-w4a4kv4", 250.0, batch=8, comparison="equal batch"),
            entry("batch", "atom-w4a4kv4", 300.0, batch=64, comparison="equal batch"),
            entry("batch", "atom-w4a4kv4", 770.0, batch=130, comparison="equal memory"),
            entry("batch", "fp16", 110.0, batch=18, comparison="equal memory"),
        ],
    )
    text = tables["batches"]("batches-x")
    batch, memory = text.split("llama-2-7b, equal memory:")
    assert [row[:4] for row in rows(batch)] == [
        ["24 GiB, `fp16`", "8", "100", "1.00x"],
        ["24 GiB, `atom-w4a4kv4`", "8", "250", "2.50x"],
        ["24 GiB, `atom-w4a4kv4`", "64", "300", ""],
    ]
    assert [row[:4] for row in rows(memory)] == [
        ["24 GiB, `fp16`", "18", "110", "1.00x"],
        ["24 GiB, `atom-w4a4kv4`", "130", "770", "7.00x"],
    ]


def test_loads(tables, tmp_path):
    write(
        tmp_path,
        [
            entry("serve", "fp16", 90.0, request_rate=2.5, errors=3),
            entry("serve", "fp16", 100.0, concurrency=16),
        ],
    )
    got = rows(tables["load"]("load-x"))
    assert [row[0] for row in got] == [
        "2.5 requests/s, 1024+512, 24 GiB, `fp16`",
        "16 concurrent, 1024+512, 24 GiB, `fp16`",
    ]
    assert got[0][1:] == ["90", "1500 / 1700", "1500.0 / 1700.0", "1700.0", "1.50", "3", "1"]
