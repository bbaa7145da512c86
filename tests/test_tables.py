"""The README's table and picture are the H200's where its results are there, else the H100's."""

import json
import re
import runpy
import shutil
import sys

import pytest

from tests.doc_commands import ROOT

RESULTS = ROOT / "benchmarks" / "results"
SERVING = json.loads((RESULTS / "serving-h100.json").read_text(encoding="utf-8"))


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """`update_tables` over a copy of the results without any of an H200."""
    shutil.copytree(RESULTS, tmp_path / "results", ignore=shutil.ignore_patterns("*h200*"))
    made = runpy.run_path(str(ROOT / "scripts" / "update_tables.py"))
    monkeypatch.setattr(sys.modules["result_files"], "RESULTS", tmp_path / "results")
    return made


def add_h200(results, entries):
    """The H100's entries as measurements of an H200."""
    environment = SERVING["environment"] | {"gpu": "NVIDIA H200"}
    content = {"format": 1, "environment": environment, "results": entries}
    (results / "serving-h200.json").write_text(json.dumps(content), encoding="utf-8")


def shown(tables, name):
    return tables["render"](f"<!-- table {name} -->\n<!-- end -->")


def test_without_an_h200_the_h100_is_shown_with_its_commits(tables):
    text = shown(tables, "summary")
    assert "NVIDIA H100 80GB HBM3" in text
    assert "commits d4695ca97876, 354b242e490a (2026-11-23)" in text
    assert "serving-h100-llama-2-7b-batch.png" in shown(tables, "picture")
    for name in ("throughput-h200", "kernels-h200", "fused-h200", "steps-h200", "experts-h200"):
        assert "Not measured yet." in shown(tables, name)


def test_an_h200_comes_first(tables, tmp_path):
    results = tmp_path / "results"
    add_h200(results, SERVING["results"])
    assert "Throughput: NVIDIA H200, " in shown(tables, "summary")
    assert "Throughput: NVIDIA H100 80GB HBM3, " in shown(tables, "summary-h100")
    assert "NVIDIA H200, torch" in shown(tables, "throughput-h200")
    with pytest.raises(SystemExit, match=r"run quatom bench plot .*serving-h200\.json"):
        shown(tables, "picture")
    (results / "serving-h200-llama-2-7b-batch.png").touch()
    assert "serving-h200-llama-2-7b-batch.png" in shown(tables, "picture")


def test_an_h200_without_the_runs_of_the_table_does_not_count(tables, tmp_path):
    add_h200(tmp_path / "results", [e for e in SERVING["results"] if e["recipe"] != "fp16"])
    assert "NVIDIA H100" in shown(tables, "summary")


def test_another_engine_is_a_row_of_its_own(tables, tmp_path):
    own = [e for e in SERVING["results"] if e["gpu_memory_gb"] == 24 and e["mode"] == "throughput"]
    (base,) = [e for e in own if e["recipe"] == "fp16"]
    other = base | {"engine": "vllm", "engine_version": "0.32.0", "output_tokens_per_s": 2426.0}
    spread = base | {"output_tokens_per_s": 9999.0, "tensor_parallel": 2}
    add_h200(tmp_path / "results", [other, spread, *own])
    rows = [line for line in shown(tables, "summary").splitlines() if line.startswith("| ")]
    assert re.search(r"^\| vllm 0\.32\.0, `fp16` \| +\| +\| 2,426 \| 2\.00x \|$", rows[-1])
    assert "9,999" not in "".join(rows)
    assert any(line.startswith("| float |") and "1,213 | 1.00x" in line for line in rows)
    assert "24 GiB, vllm 0.32.0, `fp16`" in shown(tables, "throughput-h200")


def test_a_wrong_name_is_an_error_and_not_a_missing_measurement(tables):
    with pytest.raises(FileNotFoundError):
        shown(tables, "kernels-h300")


def test_accuracy_beside_atom_and_the_float_model(tables, tmp_path):
    bits = {"bits_per_weight": 4.5, "bits_per_activation": 4.5, "bits_per_kv": 4.5}
    compared = {"same_top1": 0.8, "same_top1_standard_error": 0.005}
    compared |= {"kl_to_float": 0.25, "kl_to_float_standard_error": None}
    same = {"model": "m", "corpus": "t", "windows": 2, "sequence_length": 8, "all_windows": True}
    entries = [
        same | bits | {"recipe": recipe, "perplexity": perplexity, "float_perplexity": 20.0} | more
        for recipe, perplexity, more in (
            ("fp16", 20.0, {}),
            ("atom-w4a4kv4", 30.0, {}),
            ("atom-w4a8kv4", 25.0, {}),
            ("quatom-w4a8kv4-tuned", 22.0, compared),  # 2 of 5
            ("omniquant-w4a4kv4", 40.0, compared),  # 20 of 10
            ("awq-w4a16", 21.0, compared),  # Atom's recipe has other bits
        )
    ]
    content = {"format": 1, "environment": SERVING["environment"], "results": entries}
    (tmp_path / "results" / "accuracy-m.json").write_text(json.dumps(content), encoding="utf-8")
    rows = dict(re.findall(r"^\| `?([\w-]+)`? (.*) \|$", shown(tables, "accuracy-m"), re.MULTILINE))
    assert "| 0.40 |" in rows["quatom-w4a8kv4-tuned"]
    assert "| 2.00 |" in rows["omniquant-w4a4kv4"]
    assert "| +1.00 |  |" in rows["awq-w4a16"]
    assert rows["awq-w4a16"].endswith("| 80.0 ± 0.5 | 0.250")
    assert rows["atom-w4a4kv4"].endswith("| 4.50 |  | ")
