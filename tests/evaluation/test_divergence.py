"""Agreement and KL divergence against a computation with transformers; standard errors."""

import pytest
import torch

from quatom.errors import CalibrationError
from quatom.evaluation import perplexity
from quatom.evaluation.perplexity import measure_perplexity
from quatom.evaluation.standard_error import of_accuracy, of_average, of_mean
from quatom.loading import load
from tests.conftest import LLAMA, make_model

WINDOWS, LENGTH = 3, 50


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 256, (170,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def other_dir(tmp_path_factory):
    """The tiny model with every weight moved: near enough to agree at some tokens."""
    return make_model(tmp_path_factory.mktemp("models") / "other", LLAMA, seed=1)


@torch.no_grad()
def predictions(folder, tokens):
    """Log-probabilities (windows, length - 1, vocabulary) in float64."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    windows = tokens[: WINDOWS * LENGTH].view(WINDOWS, LENGTH)
    return model(windows).logits[:, :-1].double().log_softmax(dim=-1)


def test_divergence_is_that_of_the_definition(tiny_llama_dir, other_dir, tokens, monkeypatch):
    monkeypatch.setattr(perplexity, "LOGIT_ROWS", 20)  # 49 predictions in pieces
    own, reference = load(other_dir), load(tiny_llama_dir)
    measured = measure_perplexity(own, tokens, sequence_length=LENGTH, reference=reference)
    got = measured.divergence
    p, q = predictions(tiny_llama_dir, tokens), predictions(other_dir, tokens)
    kl = (p.exp() * (p - q)).sum(dim=-1).mean(dim=1)
    same = (p.argmax(dim=-1) == q.argmax(dim=-1)).double().mean(dim=1)
    # Float32 logits of some 10 nats: 1e-6 of that at each token.
    assert got.kl_to_float == pytest.approx(kl.mean().item(), rel=1e-4)
    assert got.kl_to_float_standard_error == pytest.approx(
        (kl.std() / WINDOWS**0.5).item(), rel=1e-3
    )
    assert got.same_top1 == pytest.approx(same.mean().item())
    assert got.same_top1_standard_error == pytest.approx((same.std() / WINDOWS**0.5).item())
    came = tokens[: WINDOWS * LENGTH].view(WINDOWS, LENGTH)[:, 1:].unsqueeze(-1)
    worse = (p - q).gather(2, came).squeeze(-1).mean(dim=1)
    # The same error as above, of a mean that is near 0.
    assert got.loss_increase == pytest.approx(worse.mean().item(), abs=1e-5)
    assert got.loss_increase_standard_error == pytest.approx(
        (worse.std() / WINDOWS**0.5).item(), rel=1e-3
    )
    # What is measured without a reference stays the same.
    alone = measure_perplexity(own, tokens, sequence_length=LENGTH)
    assert alone.divergence is None
    assert alone.perplexity == measured.perplexity


def test_a_model_agrees_with_itself(tiny_llama_dir, tokens):
    loaded = load(tiny_llama_dir)
    measured = measure_perplexity(
        loaded, tokens, sequence_length=LENGTH, max_windows=1, reference=loaded
    )
    got = measured.divergence
    assert (got.same_top1, got.kl_to_float) == (1.0, 0.0)
    assert got.loss_increase == 0.0
    assert (got.same_top1_standard_error, got.kl_to_float_standard_error) == (None, None)
    assert got.loss_increase_standard_error is None


def test_another_vocabulary_is_refused(tiny_llama_dir, tmp_path, tokens):
    other = make_model(tmp_path / "m", LLAMA | {"vocab_size": LLAMA["vocab_size"] + 32})
    with pytest.raises(CalibrationError, match=r"knows \d+ tokens and the reference .* \d+"):
        measure_perplexity(
            load(tiny_llama_dir), tokens, sequence_length=LENGTH, reference=load(other)
        )


def test_standard_errors():
    values = [1.0] * 30 + [0.0] * 90
    entry = {"metric": "acc", "value": 0.25, "examples": 120}
    assert of_accuracy(entry) == pytest.approx(of_mean(values), rel=1e-12)
    assert of_mean(values) == pytest.approx(torch.tensor(values).std().item() / 120**0.5, rel=1e-6)
    assert of_accuracy(entry | {"metric": "acc_norm,none"}) == of_accuracy(entry)
    assert of_accuracy(entry | {"metric": "perplexity", "value": 30.0}) is None
    assert of_accuracy(entry | {"examples": 1}) is None
    assert of_mean([1.0]) is None
    assert of_average([0.3, 0.4]) == pytest.approx(0.25)
