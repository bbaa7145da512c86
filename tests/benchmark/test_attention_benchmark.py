"""The attention benchmark: its committed results, ratios and plot. Measuring itself needs a GPU."""

import json
from pathlib import Path

import pytest

from quatom.benchmark.attention import GRID, _add_ratios, plot_attention

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "attention-h100.json"


@pytest.fixture(scope="module")
def rows():
    return json.loads(RESULTS.read_text())["results"]


def find(rows, **wanted):
    defaults = dict(op="decode", kv="int4", backend="cuda", head_dim=128)
    found = [row for row in rows if all(row[k] == v for k, v in (defaults | wanted).items())]
    assert len(found) == 1, f"{len(found)} rows for {wanted}"
    return found[0]


def test_every_case_of_the_grid_was_measured(rows):
    for case in GRID:
        find(
            rows,
            op=case.op,
            backend="triton" if case.op == "append" else "cuda",
            batch=case.batch,
            length=case.length,
            num_heads=case.num_heads,
            num_kv_heads=case.num_kv_heads,
            head_dim=case.head_dim,
            new_tokens=case.new_tokens,
        )


@pytest.mark.parametrize(
    ("batch", "length", "kv_heads", "share", "over_cudnn"),
    [
        (64, 1024, 32, 0.78, 2.9),
        (16, 4096, 32, 0.78, 2.9),
        (64, 4096, 8, 0.75, 2.8),
        (8, 32768, 8, 0.75, 2.8),
        (1, 32768, 8, 0.50, 1.0),
    ],
)
def test_decode_reaches_what_was_promised(rows, batch, length, kv_heads, share, over_cudnn):
    row = find(rows, batch=batch, length=length, num_heads=32, num_kv_heads=kv_heads, new_tokens=1)
    assert row["share_of_copy"] >= share
    assert row["ratio_cudnn_bf16"] >= over_cudnn
    assert row["relative_error"] < 4e-3  # bfloat16 output: half a unit is 2**-9


@pytest.mark.parametrize("kv_heads", [32, 8])
def test_long_prefill_keeps_pace_with_flash_attention(rows, kv_heads):
    row = find(rows, op="prefill", length=8192, num_heads=32, num_kv_heads=kv_heads)
    assert row["ratio_flash_bf16"] >= 0.85


def test_ratios_are_the_peers_time_over_the_rows():
    rows = [
        {"backend": "cuda", "microseconds": 10.0},
        {"backend": "peer:cudnn", "microseconds": 25.0},
    ]
    _add_ratios(rows)
    assert [row["ratio_cudnn_bf16"] for row in rows] == [2.5, 1.0]
    assert [row["ratio_flash_bf16"] for row in rows] == [None, None]


def test_plot_is_drawn_from_the_result_file(rows, tmp_path):
    plot_attention(rows, tmp_path / "attention.png", "H100")
    assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")
