"""lm-evaluation-harness's `local-completions` against our server: its numbers are the model's."""

import math

import pytest
import torch

from tests.engine.doubles import HashModel, byte_tokenizer, expected_tokens, state_of

pytestmark = pytest.mark.slow

TOKENIZER = byte_tokenizer()


@pytest.fixture
def client(server, tmp_path):
    pytest.importorskip("lm_eval")
    pytest.importorskip("tenacity")
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    TOKENIZER.save_pretrained(tmp_path)
    return LocalCompletionsAPI(
        model="hash",
        base_url=f"{server.url}/v1/completions",
        tokenizer=str(tmp_path),
        tokenizer_backend="huggingface",
        num_concurrent=1,
        max_length=512,
        batch_size=4,
    )


def requests(kind, arguments):
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type=kind, doc={}, arguments=one, idx=i) for i, one in enumerate(arguments)
    ]


def true_loglikelihood(context, continuation):
    """Of the hash model, without a server: (sum, whether every token is the most likely one)."""
    token_ids, total, greedy = list(context), 0.0, True
    for token_id in continuation:
        hidden = torch.tensor([[state_of(token_ids), 0.0]], dtype=torch.float64)
        logprobs = HashModel().compute_logits(hidden)[0].log_softmax(-1)
        total += logprobs[token_id].item()
        greedy &= int(logprobs.argmax()) == token_id
        token_ids.append(token_id)
    return total, greedy


def test_loglikelihoods(client):
    pairs = [("The sky is", " blue"), ("The sky is", " green"), ("a", "b"), ("Two and two", " = 4")]
    greedy = bytes(expected_tokens(list(b"abe"), 1))
    assert greedy.isascii()  # a token that survives the way through text
    pairs.append(("abe", greedy.decode()))
    results = client.loglikelihood(requests("loglikelihood", pairs))
    for (context, continuation), (value, is_greedy) in zip(pairs, results, strict=True):
        want, want_greedy = true_loglikelihood(context.encode(), continuation.encode())
        assert math.isclose(value, want, rel_tol=1e-5)
        assert is_greedy == want_greedy
    assert results[-1][1]


def test_generation_until_a_stop(client):
    text = TOKENIZER.decode(expected_tokens(list(b"go on"), 40))
    stop = next(text[i : i + 2] for i in range(3, 38) if text[i : i + 2].isascii())
    options = {"until": [stop], "max_gen_toks": 40, "temperature": 0.0}
    (made,) = client.generate_until(requests("generate_until", [("go on", options)]))
    assert made == text[: text.index(stop)]
