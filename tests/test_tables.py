"""Tables of README and docs hold what result files say."""

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


def test_what_an_h200_has_not_measured_is_said(tables, tmp_path):
    for name in ("throughput-h200", "kernels-h200", "fused-h200", "steps-h200", "experts-h200"):
        assert "Not measured yet." in shown(tables, name)
    add_h200(tmp_path / "results", SERVING["results"])
    assert "NVIDIA H200, torch" in shown(tables, "throughput-h200")


def test_another_engine_is_a_row_of_its_own(tables, tmp_path):
    own = [e for e in SERVING["results"] if e["gpu_memory_gb"] == 24 and e["mode"] == "throughput"]
    (base,) = [e for e in own if e["recipe"] == "fp16"]
    other = base | {"engine": "vllm", "engine_version": "0.32.0", "output_tokens_per_s": 2426.0}
    add_h200(tmp_path / "results", [other, *own])
    assert "24 GiB, vllm 0.32.0, `fp16`" in shown(tables, "throughput-h200")


def test_engines_are_compared_with_fp8_of_the_same_shape(tables, tmp_path):
    same = {"gpu_memory_gb": 24.0, "workload": "1024+512", "requests": 8, "mode": "throughput"}
    fp8 = same | {"engine": "vllm", "vllm": "0.26.0", "recipe": "fp8", "tensor_parallel": 1}
    plugin = fp8 | {"engine": "vllm+quatom", "recipe": "w4"}
    entries = [
        entry | {"model": model, "output_tokens_per_s": speed}
        for entry, model, speed in (
            (fp8, "a", 1000.0),
            (plugin, "a", 1500.0),
            (plugin | {"tensor_parallel": 2}, "a", 9999.0),
            (fp8, "b", 2000.0),
            (same | {"recipe": "w4"}, "b", 3000.0),
        )
    ]
    content = {"format": 1, "environment": SERVING["environment"], "results": entries}
    path = tmp_path / "results" / "vllm-h200.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    rows = re.findall(r"^\| (.*) \|$", shown(tables, "engines-h200"), re.MULTILINE)
    assert [row.split(" | ") for row in rows] == [
        ["output tokens/s of", *(f"{m}, 24 GiB, 8 requests of 1024+512 tokens" for m in "ba")],
        ["vLLM 0.26.0, FP8 weights, activations and KV cache", "2,000", "1,000"],
        ["vLLM 0.26.0 with Quatom's plugin, `w4`", "not measured", "1,500 (1.50x)"],
        ["Quatom's engine, `w4`", "3,000 (1.50x)", "not measured"],
    ]
    with pytest.raises(SystemExit, match=r"run quatom bench plot .*vllm-h200\.json"):
        shown(tables, "picture-h200")
    (tmp_path / "results" / "vllm-h200-engines.png").touch()
    assert "vllm-h200-engines.png" in shown(tables, "picture-h200")


def test_a_wrong_name_is_an_error_and_not_a_missing_measurement(tables):
    with pytest.raises(FileNotFoundError):
        shown(tables, "kernels-h300")


def test_accuracy_beside_atom_and_the_float_model(tables, tmp_path):
    bits = {"bits_per_weight": 4.5, "bits_per_activation": 4.5, "bits_per_kv": 4.5}
    compared = {"same_top1": 0.8, "same_top1_standard_error": 0.005}
    compared |= {"kl_to_float": 0.25, "kl_to_float_standard_error": None}
    compared |= {"loss_increase": 0.1, "loss_increase_standard_error": 0.001}
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
    assert "| +1.00 ± 0.02 |  |" in rows["awq-w4a16"]  # a thousandth of 21
    assert "| +10.00 |" in rows["atom-w4a4kv4"]
    assert rows["awq-w4a16"].endswith("| 80.0 ± 0.5 | 0.250")
    assert rows["atom-w4a4kv4"].endswith("| 4.50 |  | ")


def write(folder, name, entries):
    content = {"format": 1, "environment": SERVING["environment"], "results": entries}
    (folder / "results" / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def test_methods_of_all_models_stand_beside_published_ones(tables, tmp_path):
    assert "Not measured yet." in shown(tables, "methods-h200")
    for file in (tmp_path / "results").glob("accuracy-*"):
        file.unlink()
    same = {"corpus": "t", "windows": 2, "sequence_length": 8, "calibration": "1 x 8, seed 0"}
    same |= {"ladder": "prior-work"}
    for model, rungs in (
        ("a", {"float": 20.0, "awq_w4a16": 21.0, "smoothquant_w4a4_60": 90.0}),
        ("b", {"float": 30.0, "awq_w4a16": 32.0, "qllm_untuned": 4000.0}),
    ):
        entries = [
            same | {"model": model, "rung": rung, "perplexity": value}
            for rung, value in rungs.items()
        ]
        entries.append(same | {"model": model, "rung": "atom", "perplexity": 9.0, "ladder": "x"})
        write(tmp_path, f"ablation-{model}-h200", entries)
    rows = shown(tables, "methods-h200").splitlines()
    cells = {row.split(" | ")[0].strip("| "): row.split(" | ")[1:] for row in rows}
    assert cells["recipe"][1:3] == ["a, measured", "b, measured"]
    assert cells["float"][1:] == ["20.00", "30.00", "5.68", "5.47 |"]
    assert cells["`awq-w4a16`"][:3] == ["int4 / 16 / 16", "21.00 (+1.00)", "32.00 (+2.00)"]
    assert cells["`qllm-w4a4kv4`, untuned"][1:3] == ["", "4000 (+3970)"]
    assert cells["`atom-w4a4kv4`"][1:] == ["", "", "6.16 (+0.48)", "6.03 (+0.56) |"]
    checkpoints = [
        {"model": "gemma-3-270m", "corpus": "wikitext2", "windows": 2, "all_windows": False}
        | {"recipe": recipe, "perplexity": perplexity}
        for recipe, perplexity in (("fp16", 25.0), ("atom-w4a4kv4", 50.0))
    ]
    write(tmp_path, "accuracy-gemma-3-270m", checkpoints)
    (row,) = (r for r in shown(tables, "methods-h200").splitlines() if "`atom-w4a4kv4`" in r)
    assert "|  |  | 50.00 (+25.00) | 6.16 (+0.48)" in row
    assert not any("90.0" in row for row in rows)  # strengths are rows of their model's own table


def test_tasks_show_one_metric_each_and_no_recipe_that_lacks_one(tables, tmp_path):
    same = {"model": "m", "examples": 401, "all_examples": True, "harness": "1"}
    entries = [
        same | {"recipe": recipe, "task": task, "metric": metric, "value": value}
        for recipe, task, metric, value in (
            ("fp16", "gsm8k", "exact_match,strict-match", 0.1),
            ("fp16", "gsm8k", "exact_match,flexible-extract", 0.2),
            ("fp16", "piqa", "acc_norm", 0.5),
            ("fp16", "piqa", "acc", 0.4),
            ("w8a8", "piqa", "acc_norm", 0.5),
        )
    ]
    write(tmp_path, "zeroshot-m", entries)
    rows = shown(tables, "zeroshot-m").splitlines()
    assert "| recipe | gsm8k, flexible match | piqa | mean |" in rows
    # sqrt(0.2 * 0.8 / 400) = 0.02, sqrt(0.5 * 0.5 / 400) = 0.025; of the mean 0.016.
    assert "| float | 20.0 ± 2.0 | 50.0 ± 2.5 | 35.0 ± 1.6 |" in rows
    assert not any("w8a8" in row for row in rows)


def test_parts_have_an_increase_each(tables, tmp_path):
    same = {"model": "m", "recipe": "w4", "corpus": "t", "windows": 2, "sequence_length": 8}
    same |= {"calibration": "1 x 8, seed 0"}
    loss = ("loss_increase", "loss_increase_standard_error")
    entries = [
        same | {"rung": "float", "perplexity": 20.0} | dict.fromkeys(loss, 0.0),
        same | {"rung": "all", "perplexity": 22.1} | dict(zip(loss, (0.1, 0.0012), strict=True)),
    ]
    write(tmp_path, "parts-m", entries)
    assert "| all | 22.10 | 100.0 ± 1.2 |" in shown(tables, "parts-m")
