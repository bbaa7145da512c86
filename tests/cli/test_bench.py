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
