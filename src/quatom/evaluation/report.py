"""One self-contained HTML page of result files: no network, no script, light and dark.

It shows what the files hold. It computes differences to the float model, averages, standard errors
and, for GPUs that are named, memory and the roofline. The page says so at each.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from quatom.benchmark.memory_plan import find_gpu
from quatom.checkpoint.reader import read_model_config
from quatom.errors import CalibrationError
from quatom.evaluation.report_charts import NUM_COLOURS
from quatom.evaluation.report_model import LayerReport, OutlierReport, ReportInputs, ResultFile
from quatom.evaluation.report_outliers import read_outliers
from quatom.evaluation.report_sections import SECTIONS
from quatom.families.spec import SITES
from quatom.json_text import parse_json
from quatom.plan import ModelPlan, plan
from quatom.quantize.pipeline import REPORT_FILE

RESULT_FORMAT = 1
_IMAGES = {".png": "image/png", ".jpg": "image/jpeg", ".svg": "image/svg+xml"}


@dataclass(slots=True)
class _Collected:
    files: list[ResultFile] = field(default_factory=list)
    layers: list[LayerReport] = field(default_factory=list)
    images: list[tuple[str, str]] = field(default_factory=list)
    outliers: list[OutlierReport] = field(default_factory=list)


def read_inputs(paths: Sequence[Path], gpus: Sequence[str] = ()) -> ReportInputs:
    """Read result files, checkpoints' reports and figures.

    Args:
        paths: result files, folders of them, checkpoint folders (or their quatom_report.json),
            what `quatom inspect --json` wrote of a floating-point model, and pictures (.png, .jpg,
            .svg), which are shown as figures.
        gpus: names of GPUs on which the checkpoints' memory and speed are computed.

    Raises:
        CalibrationError: a path does not exist or is none of these, there is nothing to show, or
            GPUs are named without a checkpoint folder.
        ModelError: a GPU is unknown.
    """
    for name in gpus:
        find_gpu(name)
    found = _Collected()
    for path in paths:
        _read(path, found)
    inputs = ReportInputs(
        tuple(found.files),
        tuple(found.layers),
        tuple(found.images),
        tuple(found.outliers),
        tuple(gpus),
    )
    if gpus and not any(layer.plan for layer in inputs.layers):
        raise CalibrationError(
            f"--gpu {gpus[0]} needs a checkpoint to compute with: give its folder among the results"
        )
    if not (inputs.entries or inputs.layers or inputs.images or inputs.outliers):
        raise CalibrationError(
            f"no results in {', '.join(map(str, paths))}: give files that `quatom eval --json`, "
            "`quatom ablate --json` or `quatom bench --json` wrote"
        )
    return inputs


def _read(path: Path, found: _Collected) -> None:
    if path.is_dir():
        report = path / REPORT_FILE
        files = [report] if report.exists() else sorted(path.glob("*.json"))
        if not files:
            raise CalibrationError(
                f"{path} holds neither result files (*.json) nor a checkpoint's {REPORT_FILE}"
            )
        for file in files:
            _read(file, found)
        return
    try:
        if path.suffix in _IMAGES:
            data = base64.b64encode(path.read_bytes()).decode()
            found.images.append((path.stem, f"data:{_IMAGES[path.suffix]};base64,{data}"))
            return
        content = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CalibrationError(f"{path} does not exist: give a file or folder of results") from None
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{path} is no result file: {error}") from None
    if isinstance(content, dict) and "blocks" in content:
        name = path.resolve().parent.name if path.name == REPORT_FILE else path.stem
        found.layers.append(_layer_report(path, name, content))
    elif isinstance(content, dict) and "sites" in content:
        found.outliers.append(read_outliers(path, content))
    else:
        found.files.append(_result_file(path, content))


def _layer_report(path: Path, name: str, content: dict[str, Any]) -> LayerReport:
    try:
        blocks = sorted(content["blocks"], key=lambda block: block["block"])
        sites = sorted({s for block in blocks for s in block["linear_errors"]}, key=SITES.index)
        return LayerReport(
            name=name,
            relative_errors=tuple(block["relative_error"] for block in blocks),
            linear_errors={
                site: tuple(block["linear_errors"].get(site) for block in blocks) for site in sites
            },
            plan=_checkpoint_plan(path),
        )
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise CalibrationError(f"{path} is no report of a checkpoint: {error!r}") from None


def _checkpoint_plan(report: Path) -> ModelPlan | None:
    """What the checkpoint stores in whose folder a report lies, if it lies in one."""
    if report.name != REPORT_FILE or not (report.parent / "config.json").exists():
        return None
    config, recipe = read_model_config(report.parent)
    return None if recipe is None else plan(config, recipe)


def _result_file(path: Path, content: Any) -> ResultFile:
    if not isinstance(content, dict) or not isinstance(content.get("results"), list):
        raise CalibrationError(
            f"{path} is no result file: it has no list 'results' beside 'format', 'command' and "
            "'environment'"
        )
    if content.get("format") != RESULT_FORMAT:
        raise CalibrationError(
            f"{path} has format {content.get('format')!r}, this Quatom reads {RESULT_FORMAT}: "
            "measure again, or use the Quatom that wrote it"
        )
    return ResultFile(
        name=path.name,
        command=str(content.get("command", "")),
        environment=dict(content.get("environment", {})),
        entries=tuple(content["results"]),
    )


def render_report(inputs: ReportInputs, title: str = "Quatom results") -> str:
    """The page as text. The same inputs give the same bytes."""
    sections = [section for make in SECTIONS if (section := make(inputs)) is not None]
    models = sorted({str(e["model"]) for e in inputs.entries if "model" in e})
    count = f"{len(inputs.entries)} measurements in {len(inputs.files)} files"
    lead = f"{count}. Models: {', '.join(models)}." if models else f"{count}."
    return _template().render(title=title, lead=lead, sections=sections, colours=NUM_COLOURS)


def write_report(
    paths: Sequence[Path],
    html: Path,
    title: str = "Quatom results",
    gpus: Sequence[str] = (),
) -> None:
    """Read `paths` as `read_inputs` does and write the page.

    Raises:
        CalibrationError: an input is unusable, or the page cannot be written.
        ModelError: a GPU is unknown.
    """
    page = render_report(read_inputs(paths, gpus), title)
    try:
        html.parent.mkdir(parents=True, exist_ok=True)
        html.write_text(page, encoding="utf-8")
    except OSError as error:
        raise CalibrationError(f"cannot write {html}: {error.strerror}") from error


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("quatom.evaluation", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2")
