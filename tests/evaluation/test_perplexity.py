"""Perplexity against an independent computation with transformers, and its windows by hand."""

import math
from dataclasses import replace

import pytest
import torch

from quatom.checkpoint.reader import open_source
from quatom.errors import CalibrationError
from quatom.evaluation.perplexity import cut_windows, measure_perplexity, window_loss
from quatom.loading import build_decoder, load, load_float_layer
from quatom.modeling.build import build_block
from quatom.plan import plan
from quatom.presets import PRESETS
from quatom.recipe import KVSpec


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 256, (230,), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def their_perplexity(folder, tokens, length, windows):
    """exp of the mean loss over windows; transformers shifts labels and averages a window."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    parts = tokens[: windows * length].view(windows, length)
    losses = [model(part[None], labels=part[None]).loss.double() for part in parts]
    return torch.stack(losses).mean().exp().item()


@pytest.mark.parametrize(
    ("length", "max_windows", "windows"), [(64, None, 3), (64, 2, 2), (50, 9, 4)]
)
def test_it_is_gptqs_protocol(length, max_windows, windows, tiny_llama_dir, tokens):
    loaded = load(tiny_llama_dir)
    seen = []
    got = measure_perplexity(
        loaded,
        tokens,
        sequence_length=length,
        max_windows=max_windows,
        on_window=lambda *progress: seen.append(progress),
    )
    want = their_perplexity(tiny_llama_dir, tokens, length, windows)
    # Losses agree to about 1e-6 of some 10 nats.
    assert got.perplexity == pytest.approx(want, rel=1e-4)
    assert (got.windows, got.sequence_length) == (windows, length)
    assert got.all_windows == (max_windows != 2)
    assert [s[:2] for s in seen] == [(i + 1, windows) for i in range(windows)]
    assert seen[-1][2] == got.perplexity


def test_long_windows_are_scored_in_pieces(tiny_llama_dir, tokens, monkeypatch):
    """Pieces of logits whose boundary falls anywhere, also one row before the end."""
    loaded = load(tiny_llama_dir)
    want = window_loss(loaded, tokens[:100])
    for rows in (1, 33, 98, 99, 100):
        monkeypatch.setattr("quatom.evaluation.perplexity.LOGIT_ROWS", rows)
        assert window_loss(loaded, tokens[:100]) == pytest.approx(want, rel=1e-6)


def test_a_quantized_cache_counts(tiny_llama_dir, tokens):
    """The keys and values of a window pass through the cache in the recipe's format."""
    loaded = load(tiny_llama_dir)
    source = open_source(tiny_llama_dir)
    recipe = replace(PRESETS["fp16"], kv_cache=KVSpec(format="int4"))
    blocks = [
        build_block(layer, load_float_layer(source, layer, loaded.device, loaded.dtype))
        for layer in plan(loaded.config, recipe).layers
    ]
    quantized = build_decoder(
        plan(loaded.config, recipe), blocks, lambda name, _: source.load(name)
    )
    int4 = window_loss(replace(loaded, model=quantized), tokens[:64])
    assert int4 != pytest.approx(window_loss(load(tiny_llama_dir), tokens[:64]), rel=1e-4)


def test_windows_are_cut_in_order_and_the_tail_is_dropped():
    windows = cut_windows(torch.arange(23), 5)
    assert windows.tolist() == torch.arange(20).view(4, 5).tolist()
    assert cut_windows(torch.arange(23), 5, 2).tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert len(cut_windows(torch.arange(5), 5, 8)) == 1


def test_a_text_shorter_than_a_window_is_refused():
    with pytest.raises(CalibrationError, match=r"4 tokens, fewer than one window of 5"):
        cut_windows(torch.arange(4), 5)


@pytest.mark.parametrize("length", [0, 1, 513])
def test_windows_that_do_not_fit_the_model_are_refused(length, tiny_llama_dir, tokens):
    with pytest.raises(CalibrationError, match=f"windows of {length} tokens .* 512 positions"):
        measure_perplexity(load(tiny_llama_dir), tokens, sequence_length=length)


def test_uniform_predictions_have_the_vocabulary_as_perplexity(tiny_llama_dir, tokens):
    loaded = load(tiny_llama_dir)
    loaded.model.head.zero_()
    got = measure_perplexity(loaded, tokens, sequence_length=32)
    assert math.isclose(got.perplexity, 320, rel_tol=1e-5)
