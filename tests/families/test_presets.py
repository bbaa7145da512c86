"""Every family under every preset: quantized, loaded, and decoded through the engine."""

from dataclasses import replace

import pytest
import torch

from quatom.engine.config import EngineConfig
from quatom.engine.engine import Engine
from quatom.engine.llm import LLM
from quatom.engine.sampling import SamplingParams
from quatom.errors import RecipeError
from quatom.loading import load
from quatom.modeling.context import full_sequences_context
from quatom.modeling.rotary import RotaryTables
from quatom.presets import PRESETS
from quatom.quantize.pipeline import quantize_checkpoint
from quatom.quantize.statistics import run_block
from quatom.recipe import CalibrationSpec
from tests.conftest import quick
from tests.families.models import TINY, save_tiny

CALIBRATION = CalibrationSpec(num_samples=4, sequence_length=48)
# One preset with every part that a recipe can have, on every family; all others on experts, the
# family that differs most. Families that differ less (soft-caps, LayerNorm without gates, two
# rotary tables, norms after, partial rotary, biases, head sizes) share them out; on llama
# tests/quantize/test_one_path.py judges each. What they get besides runs among the slow tests.
WHOLE = "quatom-w4a4kv4"
OTHERS = [name for name in PRESETS if name not in ("fp16", WHOLE)]
SHARING = ("gemma2", "opt", "gemma3", "olmo2", "glm4", "starcoder2", "seed_oss", "phi3-partial")
# A rotary table of another kind is another table: tests of logits and of tables tell them apart.
OTHER_TABLES = ("llama-llama3", "llama-linear", "llama-dynamic", "llama-yarn", "qwen3-yarn")
# These have nothing that no other has: tests of configs, names and logits tell them apart.
ALIKE = (
    "arcee",
    "cohere2",
    "cwm",
    "dots1",
    "ernie4_5",
    "exaone",
    "exaone_moe",
    "falcon",
    "falcon-one-norm",
    "flex_olmo",
    "gpt_bigcode",
    "gpt_neo",
    "gpt_neox-sequential",
    "gptj",
    "granite4",
    "granite_swa",
    "granitemoe_swa",
    "granitemoeshared",
    "helium",
    "hy_v3",
    "hyperclovax",
    "internlm3",
    "iquestcoder",
    "jais2",
    "mellum",
    "ministral",
    "qwen2-windows",
    "solar_open",
    "stablelm-parallel",
    "vaultgemma",
)
CASES = [(name, WHOLE) for name in TINY if name not in (*OTHER_TABLES, *ALIKE)]
CASES += [("mixtral", preset) for preset in OTHERS if PRESETS[preset].tuning is None]
CASES += [(SHARING[i % len(SHARING)], preset) for i, preset in enumerate(OTHERS)]
CASES += [("cohere-norms", "omniquant-w4a4kv4")]  # its factors of keys go into the norms of heads
MORE = [(SHARING[i % len(SHARING)], preset) for i, preset in enumerate(OTHERS, start=3)]
MORE += [("gemma2", preset) for preset in OTHERS]
MORE += [(name, WHOLE) for name in ALIKE if name in TINY]
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in sorted(set(MORE) - set(CASES))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(name):
        if name not in made:
            made[name] = save_tiny(tmp_path_factory.mktemp("families") / name, name)
        return made[name]

    return folder


@pytest.mark.parametrize(("name", "preset"), [*CASES, *SLOW])
def test_a_preset_quantizes_and_the_engine_decodes(name, preset, folders, text_file, tmp_path):
    recipe = quick(PRESETS[preset], CALIBRATION)
    streamed = []
    quantize_checkpoint(
        folders(name),
        tmp_path / "q",
        recipe,
        calibration=text_file,
        on_block=lambda block: streamed.append(block.module),
    )
    loaded = load(tmp_path / "q")
    # What calibration ran is what was stored, bit by bit.
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 48, loaded.config.hidden_size, generator=generator)
    rotary = RotaryTables(loaded.config, 48)
    for ours, theirs in zip(streamed, loaded.model.blocks, strict=True):
        want = run_block(ours, hidden, rotary)
        assert torch.equal(run_block(theirs, hidden, rotary), want)
        hidden = want
    # Decoding goes on where the prompt ended: the greedy tokens are those of one whole pass, up to
    # near ties of two logits.
    prompt = torch.randint(0, 256, (44,), generator=generator).tolist()
    engine = Engine(loaded, EngineConfig(max_num_seqs=2, max_model_len=64, block_size=16))
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    (output,) = LLM.from_engine(engine).generate([prompt], params)
    tokens = prompt + list(output.token_ids)
    context = full_sequences_context(1, len(tokens), 16, loaded.device)
    with torch.inference_mode():
        cache = loaded.model.allocate_kv_cache(4, 16)
        logits = loaded.model.compute_logits(loaded.model(torch.tensor(tokens), context, cache))
    for position, token in enumerate(tokens[len(prompt) :], start=len(prompt) - 1):
        row = logits[position]
        assert torch.isfinite(row).all()
        # A code of 4 bits that flips at a tie moves a logit by a few percent of their spread.
        assert row.max() - row[token] <= 0.25 * row.std()


def test_what_does_not_fit_is_refused_before_anything_is_written(folders, text_file, tmp_path):
    recipe = replace(PRESETS[WHOLE], calibration=CALIBRATION, tensor_parallel=3)
    with pytest.raises(RecipeError, match="tensor_parallel 3"):
        quantize_checkpoint(folders("gemma2"), tmp_path / "q", recipe, calibration=text_file)
    assert list(tmp_path.iterdir()) == []
