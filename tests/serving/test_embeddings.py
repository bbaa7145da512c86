"""/v1/embeddings against transformers' hidden states, through the openai client."""

import base64

import numpy as np
import openai
import pytest
import torch

from quatom.engine.config import EngineConfig
from quatom.engine.engine import Engine
from quatom.engine.llm import LLM
from quatom.engine.sampling import SamplingParams
from quatom.errors import RequestError
from quatom.loading import load
from tests.serving.conftest import running_server

TEXTS = ["a", "The quick brown fox. " * 9, "ü€😀", "The quick brown fox. " * 9 + "!"]
# Unit vectors of 256 numbers from float32 sums of a few hundred terms in another order: each
# relative error is some hundred units of 2**-24, and two blocks pass it on.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def reference(tiny_llama_dir):
    """text -> the unit vector of its last token's last hidden state."""
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(tiny_llama_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)

    def embed(text):
        with torch.no_grad():
            ids = torch.tensor([tokenizer.encode(text)])
            hidden = model(ids).last_hidden_state[0, -1]
        return (hidden / hidden.norm()).numpy()

    return embed


@pytest.fixture(scope="module", params=[2048, 64], ids=["one-step", "chunks"])
def running(request, tiny_llama_dir):
    """A server; 64 tokens a step cut the longer texts into chunks."""
    config = EngineConfig(
        max_num_seqs=8, max_num_batched_tokens=request.param, kv_cache_memory=2**24
    )
    with running_server(Engine(load(tiny_llama_dir), config)) as running:
        yield running


@pytest.fixture
def client(running):
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="x", max_retries=0) as made:
        yield made


def test_vectors_are_the_model_s(client, reference):
    made = client.embeddings.create(model="hash", input=TEXTS, encoding_format="float")
    assert [e.index for e in made.data] == [0, 1, 2, 3]
    for text, entry in zip(TEXTS, made.data, strict=True):
        vector = np.array(entry.embedding)
        assert abs(np.linalg.norm(vector) - 1) < 1e-6
        np.testing.assert_allclose(vector, reference(text), atol=TOLERANCE)
    assert made.usage.prompt_tokens == sum(len(text.encode()) for text in TEXTS)
    assert made.usage.total_tokens == made.usage.prompt_tokens


def test_encodings_and_kinds_of_input(client, running):
    plain = client.embeddings.create(model="hash", input="hello", encoding_format="float").data[0]
    # The client asks for base64 by itself.
    packed = client.embeddings.create(model="hash", input=["hello"]).data[0]
    ids = client.embeddings.create(model="hash", input=list(ids_of(running, "hello"))).data[0]
    several = client.embeddings.create(model="hash", input=[list(ids_of(running, "hello"))]).data[0]
    for other in (packed, ids, several):
        np.testing.assert_allclose(other.embedding, plain.embedding, atol=TOLERANCE)
    raw = client.embeddings.with_raw_response.create(
        model="hash", input="hello", encoding_format="base64"
    ).http_response.json()["data"][0]["embedding"]
    vector = np.frombuffer(base64.b64decode(raw), dtype="<f4")
    np.testing.assert_allclose(vector, plain.embedding, atol=TOLERANCE)


def ids_of(running, text):
    return running.engine.tokenizer.encode(text)


def test_beside_other_requests(client, reference):
    """Texts share steps with an answer that is being written."""
    stream = client.completions.create(model="hash", prompt="x", max_tokens=50, stream=True)
    next(iter(stream))
    made = client.embeddings.create(model="hash", input=TEXTS * 5, encoding_format="float")
    for text, entry in zip(TEXTS * 5, made.data, strict=True):
        np.testing.assert_allclose(entry.embedding, reference(text), atol=TOLERANCE)
    assert sum(1 for _ in stream)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dimensions": 8}, "dimensions: this field is not supported"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"input": []}, "input"),
        ({"input": "x" * 600}, "600 tokens"),
        ({"input": [[9999]]}, "9999"),
        ({"input": ["a", ""]}, "no tokens"),
        ({"input": {"a": 1}}, "input"),
        ({"other": 1}, "other"),
    ],
)
def test_bad_requests_are_refused(client, options, match):
    with pytest.raises(openai.BadRequestError, match=match):
        client.embeddings.create(model="hash", input="x", extra_body=options)


def test_offline(tiny_llama_dir, reference):
    llm = LLM(tiny_llama_dir, device="cpu", max_model_len=256, kv_cache_memory=2**24)
    (made,) = llm.generate("hello", SamplingParams(max_tokens=0, embed=True))
    hidden = np.array(made.outputs[0].hidden)
    np.testing.assert_allclose(hidden / np.linalg.norm(hidden), reference("hello"), atol=TOLERANCE)
    (plain,) = llm.generate("hello", SamplingParams(max_tokens=1))
    assert plain.outputs[0].hidden == ()
    with pytest.raises(RequestError, match="embed needs max_tokens 0"):
        SamplingParams(embed=True)
