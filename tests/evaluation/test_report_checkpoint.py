"""Bits, outliers and expectations on the report, against numbers that are computed here."""

import json
import re
import xml.etree.ElementTree as ElementTree

import pytest
from typer.testing import CliRunner

from quatom.benchmark.memory_plan import GPUS, plan_memory
from quatom.benchmark.model_shapes import SHAPES, find_shape
from quatom.benchmark.roofline import Roofline
from quatom.checkpoint.schema import bits_by_linear, bits_per_weight
from quatom.cli.main import app
from quatom.errors import CalibrationError, ModelError
from quatom.evaluation.report import read_inputs, render_report
from quatom.evaluation.report_charts import Series, bar_chart, heat_map, ladder_chart
from quatom.evaluation.report_checkpoint import _bits_by_kind
from quatom.plan import plan
from quatom.presets import PRESETS
from tests.evaluation.test_report import BLOCKS, PIXEL, Tables

RECIPE = PRESETS["quatom-w4a8kv4"]
SHAPE = "llama-2-7b"


@pytest.fixture
def checkpoint(tmp_path):
    """All that the report reads of a checkpoint: no weights."""
    folder = tmp_path / "seven"
    folder.mkdir()
    quantization = {"quant_method": "quatom", "recipe": RECIPE.to_dict()}
    config = dict(SHAPES[SHAPE]) | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quatom_report.json").write_text(json.dumps({"blocks": BLOCKS}))
    return folder


def test_bits_of_every_linear_add_up_to_those_of_the_model(checkpoint):
    rows = Tables(render_report(read_inputs([checkpoint]))).sections["bits"]
    assert [cells[0] for cells in rows[1:]] == [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "all"
    ]  # fmt: skip
    resolved = plan(find_shape(SHAPE), RECIPE)
    mean = bits_per_weight(resolved)
    assert rows[-1][1:] == [f"{mean:.3f}", f"{mean * resolved.num_weights / 8e6:,.1f}"]
    q_proj = bits_by_linear(resolved)["model.layers.0.self_attn.q_proj"]
    assert rows[1][1:] == [f"{q_proj:.3f}", f"{32 * q_proj * 4096 * 4096 / 8e6:,.1f}"]


def test_expectations_are_the_plans_and_the_rooflines(checkpoint):
    rows = Tables(render_report(read_inputs([checkpoint], ["H200", "L4"]))).sections["expected"]
    assert [cells[0] for cells in rows[1:]] == ["seven\nH200", "seven\nL4"]
    resolved = plan(find_shape(SHAPE), RECIPE)
    for cells, name in zip(rows[1:], ("H200", "L4"), strict=True):
        memory = plan_memory(find_shape(SHAPE), RECIPE, GPUS[name].memory_gib)
        limit = Roofline.of(resolved, GPUS[name].ceilings).decode_step
        assert cells[1:] == [
            f"{memory.weight_bytes / 2**30:.2f}",
            f"{memory.kv_bytes_per_token / 1024:.1f}",
            f"{memory.kv_tokens:,}",
            f"{1 / limit(1, 2048):,.0f}",
            f"{64 / limit(64, 2048):,.0f}" if memory.sequences(2048) >= 64 else "does not fit",
        ]
    # Half a gigabyte per token at most from 4.8 TB/s: no more than the bandwidth gives.
    assert float(rows[1][4].replace(",", "")) < 4.8e12 / (0.5 * resolved.num_weights)


def test_every_known_gpu_has_its_rates(checkpoint):
    rows = Tables(render_report(read_inputs([checkpoint], list(GPUS)))).sections["expected"]
    assert len(rows) == 1 + len(GPUS)


def test_a_gpu_needs_a_name_that_is_known_and_a_checkpoint(checkpoint, tmp_path):
    with pytest.raises(ModelError, match="unknown GPU 'H300'"):
        read_inputs([checkpoint], ["H300"])
    (tmp_path / "x.png").write_bytes(PIXEL)
    with pytest.raises(CalibrationError, match="--gpu H200 needs a checkpoint"):
        read_inputs([tmp_path / "x.png"], ["H200"])
    copy = tmp_path / "errors.json"
    copy.write_bytes((checkpoint / "quatom_report.json").read_bytes())
    assert list(Tables(render_report(read_inputs([copy]))).sections) == ["layers"]


def magnitudes(channels=256):
    values = [1.0 + 0.001 * i for i in range(channels)]
    values[5] = 40.0
    order = sorted(range(channels), key=values.__getitem__)
    site = {"absmax": values, "second_moment": [v * v for v in values], "order": order}
    return {"layer": 3, "tokens": 4096, "sites": {"qkv": site, "down": site}}


def test_outliers_before_and_after(tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps(magnitudes()))
    page = render_report(read_inputs([tmp_path / "tiny.json"]))
    rows = Tables(page).sections["outliers"]
    # The median is the 129th of 256 values, 1.129 without the outlier; after: 1.128 over 1.065.
    assert rows[1:] == [["qkv", "256", "35.4", "1.1"], ["down", "256", "35.4", "1.1"]]
    assert "Measured on 4,096 tokens." in page
    chart = ElementTree.fromstring(re.search(r"<svg.*?</svg>", page, re.DOTALL)[0])
    curves = [mark.attrib["points"].split() for mark in chart.iter("polyline")]
    assert [len(curve) for curve in curves] == [256, 256]
    heights = [float(point.split(",")[1]) for point in curves[0]]
    assert heights.index(min(heights)) == 5
    (shade,) = (mark for mark in chart.iter("rect") if mark.attrib["class"] == "shade")
    end = float(curves[1][-1].split(",")[0])
    assert float(shade.attrib["x"]) + float(shade.attrib["width"]) == pytest.approx(end, abs=0.2)


@pytest.mark.parametrize(
    "change",
    [{"sites": 3}, {"sites": {"qkv": {"absmax": [1.0], "order": [1]}}}, {"layer": None},
     {"sites": {"qkv": {"absmax": [], "order": []}}}],
)  # fmt: skip
def test_damaged_outliers_are_named(change, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(magnitudes() | change))
    with pytest.raises(CalibrationError, match=r"x\.json holds no measured outliers"):
        read_inputs([tmp_path / "x.json"])


def test_what_inspect_writes_is_what_the_report_reads(tmp_path):
    from tests.checkpoint.models import write_model
    from tests.cli.commands import SMALL
    from tests.conftest import write_byte_tokenizer

    folder = write_model(tmp_path / "model", SMALL)
    write_byte_tokenizer(folder)
    found, out = tmp_path / "o.json", tmp_path / "page.html"
    for words in (["inspect", folder, "--json", found], ["report", found, "--html", out]):
        done = CliRunner().invoke(app, list(map(str, words)))
        assert done.exit_code == 0, done.output
    rows = Tables(out.read_text(encoding="utf-8")).sections["outliers"]
    assert [cells[0] for cells in rows[1:]] == ["qkv", "o", "gate_up", "down"]
    assert rows[1][3] == "\u2013"  # 128 channels: all would be kept
    assert "None" not in out.read_text(encoding="utf-8")


@pytest.mark.parametrize("length", [5, 24, 45])
def test_no_label_is_cut_off(length):
    """Letters of 13 pixels are at most 7.5 wide on average."""
    name = "n" * length
    one = Series(name, [1.0, 2.0])
    for chart in (
        ladder_chart("t", [name, "b"], [one]),
        heat_map("t", [one], "block", 2.0),
        bar_chart("t", [name, "b"], one, "bits"),
    ):
        for mark in ElementTree.fromstring(chart).iter("text"):
            if mark.text == name:
                assert float(mark.attrib["x"]) - 7.5 * length >= 0


@pytest.mark.parametrize("largest", [9.0, 12891.4, 9e9])
def test_the_last_tick_is_not_cut_off(largest):
    chart = ElementTree.fromstring(ladder_chart("t", ["a", "b"], [Series("s", [5.0, largest])]))
    width = float(chart.attrib["viewBox"].split()[2])
    for mark in chart.iter("text"):
        if mark.attrib["text-anchor"] == "middle":
            assert float(mark.attrib["x"]) + 7.5 * len(mark.text) / 2 <= width


def test_a_recipe_without_text_has_no_calibration(tmp_path):
    entry = {"model": "m", "recipe": "w8a8", "checkpoint_bytes": 1_000_000, "samples": None,
             "sequence_length": None}  # fmt: skip
    content = {"format": 1, "command": "", "environment": {}, "results": [entry]}
    (tmp_path / "x.json").write_text(json.dumps(content))
    page = render_report(read_inputs([tmp_path / "x.json"]))
    assert Tables(page).sections["sizes"] == [["checkpoint", "size, MB"], ["m, w8a8", "1.0"]]
    assert "None" not in page


def test_all_experts_of_a_linear_are_counted():
    resolved = plan(find_shape("mixtral-8x7b"), PRESETS["quatom-w4a8kv4"])
    kinds = _bits_by_kind(resolved)
    assert sum(count for found in kinds.values() for _, count in found) == resolved.num_weights
    bits = sum(bits * count for found in kinds.values() for bits, count in found)
    assert bits / resolved.num_weights == pytest.approx(bits_per_weight(resolved), rel=1e-12)
