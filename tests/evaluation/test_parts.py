"""`scripts/measure_parts.py`: its variants beside quantized blocks and the paged cache."""

import json
import math
import runpy
import sys

import pytest

from quatom.checkpoint.reader import open_source
from quatom.checkpoint.tokenizer import tokenizer_from_source
from quatom.evaluation.corpora import load_corpus
from quatom.evaluation.ladder import LadderRun
from quatom.evaluation.ladders import LADDERS
from quatom.evaluation.perplexity import cut_windows
from quatom.quantize.calibration_data import calibration_tokens
from quatom.quantize.tuning import block as tuned
from quatom.recipe import CalibrationSpec
from tests.checkpoint.models import write_model
from tests.cli.commands import SMALL
from tests.conftest import write_byte_tokenizer
from tests.doc_commands import ROOT


def test_variants_are_those_of_quantized_blocks(tmp_path, text_file, monkeypatch):
    import torch

    folder = write_model(tmp_path / "small", SMALL)
    write_byte_tokenizer(folder)
    for name in ("quantize_head", "quantize_input"):
        monkeypatch.setattr(tuned, name, getattr(tuned, name))  # the script sets its own
    out = tmp_path / "parts.json"
    words = (folder, "small", "quatom-w4a4kv4", text_file, text_file, 2, 32, 4, 32, "cpu", out)
    monkeypatch.setattr(sys, "argv", ["measure_parts.py", *map(str, words)])
    runpy.run_path(str(ROOT / "scripts" / "measure_parts.py"), run_name="__main__")
    content = json.loads(out.read_text(encoding="utf-8"))
    losses = {e["rung"]: math.log(e["perplexity"]) for e in content["results"]}
    assert content["command"].startswith("python scripts/measure_parts.py small small ")
    increases = {e["rung"]: e["loss_increase"] for e in content["results"]}
    assert increases["float"] == 0.0
    assert increases["all"] == pytest.approx(losses["all"] - losses["float"], abs=1e-9)

    source = open_source(folder)
    tokenizer = tokenizer_from_source(source)
    spec = CalibrationSpec(num_samples=4, sequence_length=32)
    run = LadderRun(
        source,
        calibration_tokens(text_file, tokenizer, spec, source.model_config.vocab_size),
        cut_windows(load_corpus(text_file, tokenizer, sequence_length=32).tokens, 32, 2),
        device=torch.device("cpu"),
        dtype=torch.float32,
        scores_file=tmp_path / "scores",
    )
    parts = LADDERS["parts"]
    for variant, recipe in (("float", None), ("all", parts["all_parts"])):
        want = math.log(run.measure(variant, recipe).perplexity)
        # Float32 sums in another order; where one moves a code over an edge, one of 64 tokens
        # changes by some thousandths of its loss of 30 nats.
        assert losses[variant] == pytest.approx(want, abs=0.01), variant
    # Variants differ by far more than that.
    assert len({round(loss, 2) for loss in losses.values()}) > len(losses) // 2
