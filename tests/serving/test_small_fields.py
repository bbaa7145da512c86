"""Values that OpenAI accepts and that mean something at their edge."""

import httpx
import pytest

from tests.engine.doubles import byte_tokenizer, expected_tokens

TOKENIZER = byte_tokenizer()
MESSAGES = [{"role": "user", "content": "hi"}]


def post(server, path="completions", **body):
    return httpx.post(f"{server.url}/v1/{path}", json={"model": "hash", **body}, timeout=30)


def test_top_p_of_zero_takes_the_most_likely_token(server):
    for top_p in (0, 0.0):
        made = post(server, prompt="hello", top_p=top_p, temperature=1.5, max_tokens=10, seed=1)
        want = TOKENIZER.decode(expected_tokens(TOKENIZER.encode("hello"), 10))
        assert made.json()["choices"][0]["text"] == want
    assert post(server, prompt="hello", top_p=-0.1).status_code == 400


def test_top_logprobs_of_zero_asks_for_nothing(server):
    def choice(**body):
        made = post(server, "chat/completions", messages=MESSAGES, max_tokens=2, **body)
        assert made.status_code == 200, made.text
        return made.json()["choices"][0]

    assert choice(top_logprobs=0)["logprobs"] is None
    assert choice(top_logprobs=0, logprobs=False)["logprobs"] is None
    scored = choice(top_logprobs=0, logprobs=True)["logprobs"]["content"]
    assert [entry["top_logprobs"] for entry in scored] == [[], []]
    refused = post(server, "chat/completions", messages=MESSAGES, top_logprobs=1)
    assert refused.status_code == 400


@pytest.mark.parametrize("stream", [False, True])
def test_without_max_tokens_a_nearly_full_context_gets_what_is_left(server, stream):
    prompts = ["x" * 509, "x" * 496, "x" * 100]  # of 512 tokens
    made = post(server, prompt=prompts[:2], temperature=0, return_token_ids=True)
    assert [len(c["token_ids"]) for c in made.json()["choices"]] == [3, 16]
    assert [c["finish_reason"] for c in made.json()["choices"]] == ["length"] * 2
    options = dict(stream=stream, stream_options={"include_usage": True} if stream else None)
    made = post(server, prompt=prompts, temperature=0, **options)
    assert f'"completion_tokens":{3 + 16 + 16}' in made.text
    # What is asked for must fit, and a full context has no room for anything.
    refused = post(server, prompt=prompts[0], max_tokens=4)
    assert refused.status_code == 400
    assert "lower max_tokens to 3" in refused.json()["error"]["message"]
    full = post(server, prompt="x" * 512)
    assert full.json()["error"]["code"] == "context_length_exceeded"
    assert "the prompt has 512 tokens; this model's limit is 512" in full.text
    scored = post(server, prompt="x" * 512, max_tokens=0, echo=True, logprobs=0)
    assert len(scored.json()["choices"][0]["logprobs"]["tokens"]) == 512
    chat = post(server, "chat/completions", messages=[{"role": "user", "content": "x" * 490}])
    assert chat.json()["usage"]["total_tokens"] <= 512
