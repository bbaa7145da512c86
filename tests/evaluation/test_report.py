"""The HTML report: what the files say is on the page, and a browser shows it without a network."""

import html
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
from typer.testing import CliRunner

from quatom.cli.main import app
from quatom.errors import CalibrationError
from quatom.evaluation.report import read_inputs, render_report, write_report
from quatom.evaluation.report_charts import linear_ticks, log_ticks
from quatom.evaluation.report_model import ATOM_LADDER, RUNGS

ENVIRONMENT = {
    "commit": "0123abc",
    "date": "2026-11-22",
    "torch": "2.13.0",
    "python": "3.11.7",
    "cpu": "A <CPU> & more",
    "cores": 2,
}
LADDER = dict(zip(list(RUNGS)[1:], (8928.5, 60.1, 61.2, 27.8, 26.5, 24.9, 27.0), strict=True))


def accuracy(recipe, perplexity, **more):
    return {
        "model": "tiny",
        "recipe": recipe,
        "corpus": "wikitext2",
        "sequence_length": 2048,
        "windows": 8,
        "all_windows": False,
        "perplexity": perplexity,
        "float_perplexity": 20.0,
        "bits_per_weight": 4.19,
        "bits_per_activation": 4.25,
        "bits_per_kv": 4.5,
        "backend": "reference",
        "seconds": 1.0,
    } | more


def zero_shot(recipe, task, metric, value, examples=101):
    names = {"model": "tiny", "recipe": recipe, "task": task, "metric": metric}
    return names | {"value": value, "examples": examples, "all_examples": False}


SIX = {"piqa": "acc_norm", "arc_easy": "acc_norm", "arc_challenge": "acc_norm", "boolq": "acc"}
SIX |= {"hellaswag": "acc_norm", "winogrande": "acc"}

FILES = {
    "ablation-tiny.json": [
        {"model": "tiny", "rung": rung, "corpus": "wikitext2", "windows": 8, "perplexity": value}
        for rung, value in LADDER.items()
    ],
    "accuracy-tiny.json": [
        accuracy("atom-w4a4kv4", 25.0),
        accuracy("fp16", 20.0),
        accuracy("w8a8", 20.5, corpus="ptb", windows=3, all_windows=True, float_perplexity=None),
    ],
    "zeroshot-tiny.json": [
        *(zero_shot("fp16", task, metric, 0.5) for task, metric in SIX.items()),
        zero_shot("atom-w4a4kv4", "piqa", "acc", 0.25),
        zero_shot("atom-w4a4kv4", "piqa", "acc_norm", 0.75),
        zero_shot("atom-w4a4kv4", "lambada_openai", "perplexity", 33.25),
    ],
    "quantize-cpu.json": [
        {
            "model": "tiny",
            "recipe": "atom-w4a4kv4",
            "samples": 128,
            "sequence_length": 2048,
            "seconds": 61.5,
            "peak_rss_gb": 1.5,
            "peak_gpu_gb": None,
            "checkpoint_bytes": 131_072_000,
        }
    ],
    "kernels-h100.json": [{"op": "linear_w4a4", "m": 16, "microseconds": 12.345678}],
}
BLOCKS = [
    {
        "block": i,
        "relative_error": None if i == 1 else 0.01 * (i + 1),
        # Alphabetical, as checkpoints store them; shown in the order of the block.
        "linear_errors": {"down": 0.08, "gate_up": 0.01 * i, "o": 0.04, "qkv": 0.02},
    }
    for i in range(4)
]
PIXEL = (
    b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x00\x01\x00\x00\x00\x01\x08\x06\x00\x00\x00\x1f"
    b"\x15\xc4\x89\x00\x00\x00\rIDATx\x9cc\xf8\xcf\xc0\xf0\x1f\x00\x05\x00\x01\xff\x89\x99=\x1d"
    b"\x00\x00\x00\x00IEND\xaeB`\x82"
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder of results, a checkpoint folder and a picture."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "results").mkdir()
    for name, entries in FILES.items():
        content = {"format": 1, "command": f"quatom --json {name}", "environment": ENVIRONMENT}
        (folder / "results" / name).write_text(json.dumps(content | {"results": entries}))
    (folder / "tiny-atom").mkdir()
    report = {"recipe": "atom-w4a4kv4", "blocks": BLOCKS}
    (folder / "tiny-atom" / "quatom_report.json").write_text(json.dumps(report))
    (folder / "outliers.png").write_bytes(PIXEL)
    return [folder / "results", folder / "tiny-atom", folder / "outliers.png"]


@pytest.fixture(scope="module")
def page(inputs):
    return render_report(read_inputs(inputs))


class Tables(HTMLParser):
    """Rows of cells of every table, by the section that holds it."""

    def __init__(self, text):
        super().__init__()
        self.sections: dict[str, list[list[str]]] = {}
        self.section, self.cell = "", None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag == "section":
            self.section = dict(attributes)["id"]
            self.sections[self.section] = []
        elif tag == "tr":
            self.sections[self.section].append([])
        elif tag in ("td", "th"):
            self.cell = ""

    def handle_data(self, data):
        if self.cell is not None:
            self.cell += data

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.sections[self.section][-1].append(self.cell)
            self.cell = None


@pytest.fixture(scope="module")
def tables(page):
    return Tables(page).sections


def row(table, name):
    (found,) = (cells for cells in table if cells[0] == name)
    return found


def test_every_section_stands_on_the_page_and_in_its_menu(page, tables):
    order = ["ladder", "perplexity", "zero-shot", "layers", "figures", "sizes", "other", "origin"]
    assert list(tables) == order
    assert re.findall(r'<a href="#([\w-]+)">', page) == order


def test_the_ladder_stands_beside_the_posters_numbers(tables):
    header, *rows = tables["ladder"]
    assert header[1] == "tiny\nwikitext2, 8 windows\nperplexity"
    assert header[3] == "Atom's poster\nLlama-7B\nperplexity"
    assert [cells[0] for cells in rows] == list(RUNGS.values())
    assert [cells[3] for cells in rows] == [f"{value:,.2f}" for value in ATOM_LADDER.values()]
    # The float model comes from the accuracy file: 27 / 20 is 35 % more, 8928.5 is 446 times.
    assert row(rows, "floating point")[1:3] == ["20.00", ""]
    assert row(rows, "+ INT4 KV cache")[1:] == ["27.00", "+35.0 %", "6.16", "+8.5 %"]
    assert row(rows, "W4A4 round to nearest")[1:3] == ["8,928.50", "× 446"]


def test_a_rung_that_atom_does_not_have_is_shown_last(tmp_path):
    entry = {"model": "tiny", "corpus": "wikitext2", "windows": 8, "perplexity": 22.0}
    entries = [entry | {"rung": "rotation"}, entry | {"rung": "gptq"}]
    content = {"format": 1, "command": "", "environment": {}, "results": entries}
    (tmp_path / "ablation-x.json").write_text(json.dumps(content))
    rows = Tables(render_report(read_inputs([tmp_path]))).sections["ladder"]
    assert [cells[0] for cells in rows[1:]] == ["+ GPTQ", "rotation"]


def test_another_ladder_has_its_own_chart_and_the_same_float_model(tmp_path):
    base = {"model": "tiny", "corpus": "wikitext2", "windows": 8}
    entries = [
        base | {"ladder": "atom", "rung": "float", "perplexity": 20.0},
        base | {"ladder": "atom", "rung": "rtn", "perplexity": 900.0},
        base | {"ladder": "quatom", "rung": "atom", "perplexity": 30.0},
        base | {"ladder": "quatom", "rung": "group_rotation", "perplexity": 25.0},
    ]
    content = {"format": 1, "command": "", "environment": {}, "results": entries}
    (tmp_path / "ablation-x.json").write_text(json.dumps(content))
    page = render_report(read_inputs([tmp_path]))
    rows = Tables(page).sections["ladder"]
    assert rows[1:3] == [
        ["floating point", "20.00", "", "5.68", ""],
        ["W4A4 round to nearest", "900.00", "× 45", "2,315.52", "× 408"],
    ]
    assert rows[4:] == [
        ["floating point", "20.00", ""],
        ["atom", "30.00", "+50.0 %"],
        ["group rotation", "25.00", "+25.0 %"],
    ]
    assert page.count("<svg") == 2
    assert "<h3>Ladder: quatom</h3>" in page


def test_perplexities_have_the_float_model_first_and_say_their_windows(tables):
    header, *rows = tables["perplexity"]
    assert header[4::2] == ["wikitext2\nfirst 8 windows\nof 2048", "ptb\nall 3 windows\nof 2048"]
    assert [cells[0] for cells in rows] == ["float", "atom-w4a4kv4", "w8a8"]
    assert row(rows, "atom-w4a4kv4") == (
        ["atom-w4a4kv4", "4.19", "4.25", "4.50", "25.00", "+25.0 %", "–", "–"]
    )
    assert row(rows, "w8a8")[4:] == ["–", "–", "20.50", "–"]


def test_accuracies_have_their_standard_error_and_count(page, tables):
    header, float_row, atom_row, *every = tables["zero-shot"]
    assert header[1:3] == ["piqa\nacc_norm", "arc_easy\nacc_norm"]
    # sqrt(0.5 * 0.5 / 100) = 0.05 and sqrt(0.75 * 0.25 / 100) = 0.0433.
    assert float_row == ["float", *["50.00 ± 5.00"] * 6, "50.00"]
    assert atom_row == ["atom-w4a4kv4", "75.00 ± 4.33", *["–"] * 6]
    assert ["atom-w4a4kv4", "lambada_openai", "perplexity", "33.2500", "101"] in every
    assert "Each task on the first 101 examples." in page


def test_errors_of_every_block_and_place_are_shown(page, tables):
    assert tables["layers"][0] == ["block", "hidden state", "qkv", "o", "gate_up", "down"]
    assert tables["layers"][2] == ["1", "–", "0.0200", "0.0400", "0.0100", "0.0800"]
    assert "<title>gate_up, block 3: 0.0300</title>" in page
    assert "<title>tiny-atom, block 3: 0.0400</title>" in page
    assert "up to 0.08, in all" in page
    assert 'fill-opacity="0.375"><title>gate_up, block 3' in page  # 0.03 of 0.08


def test_sizes_other_measurements_and_origins_are_shown(page, tables):
    assert tables["sizes"][1][:3] == ["tiny, atom-w4a4kv4", "131.1", "128 × 2048"]
    assert tables["other"][1] == ["linear_w4a4", "16", "12.35"]
    assert row(tables["origin"], "kernels-h100.json")[1:4] == [
        "quatom --json kernels-h100.json",
        "2026-11-22, 0123abc",
        "A <CPU> & more, 2 cores",
    ]
    assert html.escape("A <CPU> & more") in page


def test_pictures_are_in_the_page(page):
    assert '<img src="data:image/png;base64,iVBOR' in page
    assert "<figcaption>outliers</figcaption>" in page


def test_nothing_is_loaded_from_elsewhere(page):
    """Neither addresses nor scripts, and a policy that forbids both."""
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page
    assert not re.search(r"https?:|//\w|@import|url\(|<script|<link|<iframe|\bon\w+=", page)
    assert set(re.findall(r'\ssrc="([^:"]+):', page)) == {"data"}


def test_the_page_follows_light_and_dark(page):
    assert 'name="color-scheme" content="light dark"' in page
    used = set(re.findall(r"var\((--[\w-]+)\)", page))
    light, dark = page.split("prefers-color-scheme: dark", 1)
    for scheme in (light, dark.split("box-sizing", 1)[0]):
        assert used <= set(re.findall(r"(--[\w-]+):", scheme))


def test_charts_are_well_formed_and_named(page):
    charts = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(charts) == 3
    for chart in charts:
        root = ElementTree.fromstring(chart)
        width, height = map(float, root.attrib["viewBox"].split()[2:])
        assert root.attrib["aria-label"]
        for mark in root.iter("circle"):
            assert 0 <= float(mark.attrib["cx"]) <= width
            assert 0 <= float(mark.attrib["cy"]) <= height


def test_dots_of_the_ladder_are_in_the_order_of_their_numbers(page):
    """On the logarithmic axis distances are ratios."""
    chart = ElementTree.fromstring(re.search(r"<svg.*?</svg>", page, re.DOTALL)[0])
    x = {
        mark.find("title").text: float(mark.attrib["cx"])
        for mark in chart.iter("circle")
        if mark.find("title").text.startswith("tiny")
    }
    name = "tiny, wikitext2, 8 windows: "
    assert len(x) == len(RUNGS)
    ordered = sorted(x.items(), key=lambda item: item[1])
    assert [float(label.removeprefix(name)) for label, _ in ordered] == sorted(
        [20.0, *LADDER.values()]
    )
    wide = x[f"{name}61.20"] - x[f"{name}26.50"]  # a factor of 2.309
    wider = x[f"{name}8928.50"] - x[f"{name}20.00"]  # a factor of 446.4
    assert wide / wider == pytest.approx(0.8370 / 6.1013, abs=0.002)  # of natural logarithms


def test_ticks_enclose_the_numbers():
    assert log_ticks(5.68, 9000.0) == [1.0, 10.0, 100.0, 1000.0, 10000.0]
    assert log_ticks(5.0, 20.0) == [5.0, 10.0, 20.0]
    assert linear_ticks(0.34) == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert linear_ticks(1.0) == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert linear_ticks(0.0) == [0.0, 1.0]


def test_markup_in_names_is_text(tmp_path):
    entry = {"model": "<b>bold</b>", "rung": "rtn", "corpus": "c", "windows": 1, "perplexity": 9.0}
    content = {"format": 1, "command": "<i>", "environment": {}, "results": [entry]}
    (tmp_path / "ablation-x.json").write_text(json.dumps(content))
    page = render_report(read_inputs([tmp_path]))
    assert "<b>" not in page
    assert "<i>" not in page
    assert "&lt;b&gt;bold&lt;/b&gt;" in page


def test_the_same_inputs_give_the_same_page(inputs, page):
    assert render_report(read_inputs(inputs)) == page


def test_the_command_writes_the_page(inputs, page, tmp_path):
    out = tmp_path / "new" / "page.html"
    done = CliRunner().invoke(app, ["report", *map(str, inputs), "--html", str(out)])
    assert done.exit_code == 0, done.output
    assert out.read_text(encoding="utf-8") == page


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("not json", "is no result file"),
        ('{"results": 1}', "has no list 'results'"),
        ('{"format": 2, "results": []}', "has format 2, this Quatom reads 1"),
        ('{"format": 1, "results": []}', "no results in"),
        ('{"blocks": [{"block": 0}]}', "no report of a checkpoint"),
    ],
)
def test_an_unusable_file_is_named(tmp_path, content, match):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(CalibrationError, match=match):
        read_inputs([tmp_path / "x.json"])


def test_a_missing_file_and_an_empty_folder_are_named(tmp_path):
    with pytest.raises(CalibrationError, match=r"gone\.json does not exist"):
        read_inputs([tmp_path / "gone.json"])
    with pytest.raises(CalibrationError, match="neither result files"):
        read_inputs([tmp_path])


BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason=f"needs one of {', '.join(BROWSERS)} on the PATH"
)


def browse(folder, *arguments):
    """Run headless Chromium with a profile of its own and no network."""
    return subprocess.run(
        [
            BROWSER,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--no-first-run",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={folder / 'profile'}",
            *arguments,
        ],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout


# Writes what the browser made of the page into its title, where --dump-dom shows it.
PROBE = """<script>addEventListener("load", () => {
  const boxes = [...document.querySelectorAll("svg")].map(s => s.getBoundingClientRect());
  const hidden = [...document.querySelectorAll("svg text")].filter(t => {
    const box = t.getBoundingClientRect(), chart = t.closest("svg").getBoundingClientRect();
    return box.left < chart.left - 1 || box.right > chart.right + 1
      || box.bottom > chart.bottom + 1;
  });
  document.title = JSON.stringify({
    overflow: document.documentElement.scrollWidth - innerWidth,
    charts: boxes.map(b => [b.width > 250, b.height > 40]),
    hidden: hidden.map(t => t.textContent),
    images: [...document.images].map(i => i.naturalWidth),
    ink: getComputedStyle(document.querySelector("svg text")).fill,
    page: getComputedStyle(document.body).backgroundColor,
  });
});</script>"""


@needs_browser
@pytest.mark.parametrize("width", [1100, 500])
def test_a_browser_lays_the_page_out(page, tmp_path, width):
    """The probe needs a script, which the page's own policy forbids: the copy goes without it."""
    copy = re.sub(r"<meta http-equiv=.*?>", PROBE, page)
    (tmp_path / "page.html").write_text(copy, encoding="utf-8")
    url = (tmp_path / "page.html").as_uri()
    dom = browse(tmp_path, f"--window-size={width},900", "--dump-dom", url)
    seen = json.loads(html.unescape(re.search(r"<title>(\{.*?\})</title>", dom)[1]))
    assert seen["overflow"] <= 0
    assert seen["charts"] == [[True, True]] * 3
    assert seen["hidden"] == []
    assert seen["images"] == [1]


@needs_browser
@pytest.mark.parametrize(("scheme", "dark"), [(1, False), (0, True)])
def test_a_browser_draws_the_page_in_both_schemes(inputs, tmp_path, scheme, dark):
    import matplotlib.image

    write_report(inputs, tmp_path / "page.html")
    browse(
        tmp_path,
        f"--blink-settings=preferredColorScheme={scheme}",
        "--window-size=900,1400",
        f"--screenshot={tmp_path / 'shot.png'}",
        (tmp_path / "page.html").as_uri(),
    )
    picture = matplotlib.image.imread(tmp_path / "shot.png")[..., :3]
    background = picture[5, 5]
    assert (background.max() < 0.2) if dark else (background.min() > 0.9)
    # Text, rules and dots: neither an empty page nor a full one.
    ink = (abs(picture - background).max(axis=-1) > 0.3).mean()
    assert 0.01 < ink < 0.25
