"""What `quatom.LLM` takes for a prompt: anything else is refused, never cut or guessed."""

import numpy as np
import pytest
import torch

from quatom import LLM, SamplingParams
from quatom.errors import RequestError

ONE = SamplingParams(max_tokens=1, temperature=0.0)
MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def llm(tiny_llama_dir):
    return LLM(tiny_llama_dir, device="cpu")


@pytest.mark.parametrize(
    "wrong", [MESSAGES, MESSAGES[0], ["a", 5], [5, "a"], [[5, None]], [1.5, 2], b"ab", None, [None]]
)
def test_what_is_no_prompt_is_refused(llm, wrong):
    with pytest.raises(RequestError, match=r"a text or a list of token ids, got .*encode_chat\(\)"):
        llm.generate(wrong, ONE)


@pytest.mark.parametrize("wrong", [MESSAGES, b"ab", None, ["a"]])
def test_a_stream_refuses_the_same(llm, wrong):
    with pytest.raises(RequestError, match="a text or a list of token ids"):
        llm.stream(wrong, ONE)


def test_integers_of_any_kind_are_token_ids(llm):
    want = llm.generate([5, 6, 7], ONE)[0].outputs[0].token_ids
    for ids in ((5, 6, 7), np.array([5, 6, 7]), torch.tensor([5, 6, 7])):
        (got,) = llm.generate(ids, ONE)
        assert got.outputs[0].token_ids == want
        assert got.prompt_token_ids == [5, 6, 7]
    assert len(llm.generate([[5, 6, 7], "a"], ONE)) == 2
    assert llm.generate([], ONE) == []
