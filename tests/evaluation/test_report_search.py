"""What a search found is drawn in the report: bits against error."""

import json

from quatom.evaluation.report import read_inputs, render_report
from tests.evaluation.test_report import ENVIRONMENT

ENTRY = {
    "model": "tiny",
    "recipe": "quatom-w4a4kv4-at-5-bits",
    "base": "quatom-w4a4kv4",
    "raised": ["weights", "kv_cache"],
    "mean_bits": 4.96875,
    "base_mean_bits": 4.5,
    "base_divergence": 0.75,
    "expected_divergence": 0.421875,
    "curve": [[4.5, 0.75], [4.96875, 0.421875], [8.5, 0.0625]],
    "options": [
        {"layer": 7, "place": "down", "option": "weights int8", "bits": 0.25, "gain": 0.125,
         "chosen": True},
        {"layer": 3, "place": "kv_cache", "option": "KV cache int8", "bits": 0.21875,
         "gain": 0.203125, "chosen": True},
        {"layer": 1, "place": "o", "option": "weights int8", "bits": 0.25, "gain": 0.001,
         "chosen": False},
    ],
}  # fmt: skip


def page(tmp_path, *entries):
    content = {"format": 1, "command": "c", "environment": ENVIRONMENT, "results": list(entries)}
    (tmp_path / "search.json").write_text(json.dumps(content))
    return render_report(read_inputs([tmp_path / "search.json"]))


def test_a_search_is_drawn(tmp_path):
    text = page(tmp_path, ENTRY)
    assert "Bits against error" in text
    assert "4.969 bits, mean of weights, kv_cache: 0.4219" in text  # of a point
    assert "2 places raised, by gain per bit" in text
    assert text.index("layer 3 kv_cache") < text.index("layer 7 down")
    assert "layer 1 o" not in text
    assert "Other measurements" not in text


def test_a_search_that_raised_nothing(tmp_path):
    same = {"mean_bits": 4.5, "expected_divergence": 0.75, "options": ENTRY["options"][2:]}
    text = page(tmp_path, ENTRY | same | {"curve": [[4.5, 0.75]]})
    assert "Bits against error" in text
    assert "places raised" not in text


def test_without_a_search_there_is_no_section(tmp_path):
    assert "Bits against error" not in page(tmp_path, {"model": "tiny", "seconds": 1})
