"""Result files: entries, replacement of what is measured again, and nothing else lost."""

import json
import multiprocessing
from dataclasses import replace

import pytest

from quatom.checkpoint.schema import bits_per_activation, bits_per_kv, bits_per_weight
from quatom.errors import CalibrationError
from quatom.evaluation.perplexity import Perplexity
from quatom.evaluation.results import accuracy_entry, add_results, read_results
from quatom.loading import load
from quatom.plan import plan
from quatom.presets import PRESETS

MEASURED = Perplexity(
    perplexity=12.5, sequence_length=64, windows=8, all_windows=False, seconds=1.26
)


def entry(recipe="atom-w4a4kv4", perplexity=20.0, **changes):
    return {
        "model": "m",
        "recipe": recipe,
        "corpus": "wikitext2",
        "sequence_length": 2048,
        "windows": 8,
        "backend": "reference",
        "perplexity": perplexity,
        "float_perplexity": perplexity if recipe == "fp16" else None,
    } | changes


def results(path):
    return json.loads(path.read_text())["results"]


def test_an_entry_says_what_was_measured_on_what(tiny_llama_dir):
    loaded = load(tiny_llama_dir)
    resolved = plan(loaded.config, PRESETS["atom-w4a4kv4"])
    loaded = replace(loaded, plan=resolved)
    got = accuracy_entry(loaded, "tiny", "topics", MEASURED)
    assert got == {
        "model": "tiny",
        "recipe": "atom-w4a4kv4",
        "corpus": "topics",
        "sequence_length": 64,
        "windows": 8,
        "all_windows": False,
        "perplexity": 12.5,
        "float_perplexity": None,
        "bits_per_weight": bits_per_weight(resolved, loaded.source_dtype),
        "bits_per_activation": bits_per_activation(resolved),
        "bits_per_kv": bits_per_kv(resolved),
        "backend": "torch",
        "device": "cpu",
        "dtype": "float32",
        "seconds": 1.3,
    }
    plain = accuracy_entry(load(tiny_llama_dir), "tiny", "topics", MEASURED)
    assert plain["float_perplexity"] == plain["perplexity"]
    assert plain["bits_per_weight"] == 32


def test_a_new_file_has_format_environment_and_command(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["quatom", "eval", "a b"])
    add_results(tmp_path / "deep" / "a.json", [entry()])
    data = json.loads((tmp_path / "deep" / "a.json").read_text())
    assert data["format"] == 1
    assert {"torch", "python", "cpu", "date"} <= data["environment"].keys()
    assert data["command"] == "quatom eval 'a b'"
    environment = data["environment"]
    machine = environment.get("gpu", environment["cpu"])
    origin = {"command": "quatom eval 'a b'", "commit": environment["commit"], "machine": machine}
    assert data["results"] == [entry() | origin]
    assert [f.name for f in (tmp_path / "deep").iterdir()] == ["a.json"]


def test_measuring_again_replaces_and_measuring_something_else_adds(tmp_path):
    path = tmp_path / "a.json"
    add_results(path, [entry(), entry("w8a8", 19.5)])
    add_results(path, [entry(perplexity=21.0)])
    others = [
        entry(windows=16),
        entry(corpus="ptb"),
        entry(model="n"),
        entry(backend="cuda"),
        entry(sequence_length=1024),
    ]
    for other in others:
        add_results(path, [other])
    origin = ("command", "commit", "machine")
    got = [{k: v for k, v in e.items() if k not in origin} for e in results(path)]
    assert got == [entry("w8a8", 19.5), entry(perplexity=21.0), *others]


def test_an_entry_keeps_the_machine_that_it_was_measured_on(tmp_path):
    path = tmp_path / "a.json"
    add_results(path, [entry()])
    data = json.loads(path.read_text())
    del data["results"][0]["machine"]  # as older versions wrote them
    data["environment"]["gpu"] = "another GPU"
    path.write_text(json.dumps(data))
    add_results(path, [entry(windows=16)])
    here = json.loads(path.read_text())["environment"]
    machines = [e["machine"] for e in results(path)]
    assert machines == ["another GPU", here.get("gpu", here["cpu"])]


def test_an_entry_without_a_dtype_is_replaced_and_one_with_another_is_not(tmp_path):
    path = tmp_path / "a.json"
    add_results(path, [entry()])  # as older versions wrote them
    add_results(path, [entry(dtype="float16", device="cuda")])
    add_results(path, [entry(dtype="bfloat16", device="cuda", perplexity=21.0)])
    add_results(path, [entry(dtype="bfloat16", device="cuda", perplexity=22.0)])
    got = [(e["dtype"], e["perplexity"]) for e in results(path)]
    assert got == [("float16", entry()["perplexity"]), ("bfloat16", 22.0)]


def test_the_float_perplexity_is_that_of_the_same_windows(tmp_path):
    path = tmp_path / "a.json"
    add_results(path, [entry(), entry(windows=16, perplexity=30.0)])
    add_results(path, [entry("fp16", 19.0)])
    by = {(e["recipe"], e["windows"]): e["float_perplexity"] for e in results(path)}
    assert by == {("atom-w4a4kv4", 8): 19.0, ("atom-w4a4kv4", 16): None, ("fp16", 8): 19.0}


def test_entries_of_tasks_live_beside_perplexities(tmp_path):
    path = tmp_path / "a.json"
    task = {"model": "m", "recipe": "fp16", "task": "piqa", "metric": "acc", "value": 0.7}
    add_results(path, [entry("fp16", 19.0)])
    add_results(path, [task, task | {"metric": "acc_norm"}])
    add_results(path, [task | {"value": 0.8}])
    assert len(results(path)) == 3
    assert results(path)[-1]["value"] == 0.8


@pytest.mark.parametrize("content", ["{}", "[]", "no json", '{"results": 3}'])
def test_a_file_of_something_else_is_kept(content, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(CalibrationError, match=r"a\.json exists and is no result file"):
        add_results(path, [entry()])
    assert path.read_text() == content


def test_a_path_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CalibrationError, match=r"cannot write .*a\.json"):
        read_results(tmp_path / "file" / "a.json")
    with pytest.raises(CalibrationError, match=r"cannot write .*directory"):
        read_results(tmp_path)


def test_a_crash_while_writing_keeps_the_earlier_results(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    add_results(path, [entry()])
    before = path.read_text()

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", crash)
    with pytest.raises(KeyboardInterrupt):
        add_results(path, [entry(windows=16)])
    assert path.read_text() == before


def _add(path, first, both):
    both.wait(timeout=120)
    for number in range(first, first + 10):
        add_results(path, [entry(recipe=f"recipe-{number}")])


def test_processes_that_write_at_the_same_time_lose_nothing(tmp_path):
    path = tmp_path / "accuracy.json"
    spawn = multiprocessing.get_context("spawn")
    both = spawn.Barrier(2)
    other = spawn.Process(target=_add, args=(path, 10, both))
    other.start()
    _add(path, 0, both)
    other.join()
    assert other.exitcode == 0
    assert {e["recipe"] for e in results(path)} == {f"recipe-{number}" for number in range(20)}
