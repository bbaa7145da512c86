"""`quatom bench throughput` and `quatom bench serve` as a shell sees them."""

import json

import pytest

TINY = ("bench", "throughput", "--random-weights", "tiny", "--device", "cpu")


def test_throughput_writes_an_entry_for_each_recipe_and_batch(shell, tmp_path):
    path = tmp_path / "serving.json"
    common = (*TINY, "--recipe", "fp16", "--recipe", "w8a8", "--layers", 1, "--max-num-seqs", 4)
    common += ("--max-num-batched-tokens", 128, "--ceilings", "0.001,0.01,0.02", "--json", path)
    done = shell(*common, "--input-len", 20, "--output-len", 3, "--num-prompts", 5)
    assert done.status == 0, done.err
    assert "tiny, 1 layers w8a8" in done.out
    done = shell(*common, "--input-len", 20, "--batch", "1,2", "--gpu-memory", 0.05)
    assert done.status == 0, done.err
    content = json.loads(path.read_text())
    assert [(e["recipe"], e["mode"], e["batch"]) for e in content["results"]] == [
        ("fp16", "throughput", None),
        ("w8a8", "throughput", None),
        ("fp16", "batch", 1),
        ("fp16", "batch", 2),
        ("w8a8", "batch", 1),
        ("w8a8", "batch", 2),
    ]
    assert content["environment"]["fp8_tflops"] == 0.02
    assert all(str(tmp_path) not in e["command"] for e in content["results"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--batch", "1,two"), "not a list of positive numbers"),
        (("--batch", "0"), "not a list of positive numbers"),
        (("--ceilings", "3,760"), "not three positive numbers"),
        (("--recipe", "nope"), "unknown recipe"),
        (("--gpu-memory", "0.001"), "the budget is 0.001 GiB"),
    ],
)
def test_options_that_make_no_sense(words, message, shell):
    done = shell(*TINY, *words)
    assert done.status != 0
    assert message in " ".join(done.err.split())


def test_serve_measures_every_load_on_a_server_of_its_own(shell, tmp_path):
    path = tmp_path / "serving.json"
    done = shell(
        *("bench", "serve", "--random-weights", "tiny", "--recipe", "w4a16", "--device", "cpu"),
        *("--gpu-memory", 0.05, "--max-num-seqs", 4, "--max-num-batched-tokens", 128),
        *("--max-model-len", 64, "--input-len", 20, "--output-len", 4, "--num-prompts", 4),
        *("--concurrency", 2, "--request-rate", 20, "--json", path),
    )
    assert done.status == 0, done.err
    entries = json.loads(path.read_text())["results"]
    loads = [(e["mode"], e["recipe"], e["concurrency"], e["request_rate"]) for e in entries]
    assert loads == [
        ("serve", "w4a16", 2, None),
        ("serve", "w4a16", None, 20.0),
    ]
    assert all(e["errors"] == 0 and e["kv_tokens"] > 0 for e in entries)
    assert all(e["gpu_memory_gb"] == 0.05 for e in entries)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--random-weights", "tiny"), "give --concurrency, --request-rate or both"),
        (("--concurrency", "1"), "give one of MODEL, --random-weights and --url"),
        (("--random-weights", "tiny", "--concurrency", "0"), "not a list of positive numbers"),
        (("--random-weights", "tiny", "--request-rate", "x"), "not a list of positive numbers"),
        (("--url", "http://127.0.0.1:9", "--concurrency", "1"), "gave no model"),
    ],
)
def test_loads_that_make_no_sense(words, message, shell):
    done = shell("bench", "serve", *words)
    assert done.status != 0
    assert message in " ".join(done.err.split())
