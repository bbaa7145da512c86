"""The openai client against our server: it parses, and the tokens are those of the hash model."""

import asyncio
import json

import pytest

from tests.engine.doubles import byte_tokenizer, expected_tokens

openai = pytest.importorskip("openai")

TOKENIZER = byte_tokenizer()


def text_after(prompt: str, count: int) -> str:
    """Text of what greedy decoding gives after a prompt."""
    return TOKENIZER.decode(expected_tokens(TOKENIZER.encode(prompt), count))


def chat_prompt(content: str) -> str:
    return f"<user>user: {content}\n<assistant>"


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_models(client):
    assert [m.id for m in client.models.list()] == ["hash", "alias"]
    assert client.models.retrieve("alias").id == "alias"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("gpt")
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt", prompt="x")
    assert caught.value.code == "model_not_found"


def test_completion(client):
    made = client.completions.create(model="hash", prompt="hello", temperature=0, max_tokens=12)
    assert made.choices[0].finish_reason == "length"
    assert made.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": 5,
        "completion_tokens": 12,
        "total_tokens": 17,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    ids = client.completions.create(
        model="hash",
        prompt=list(b"hello"),
        temperature=0,
        max_tokens=12,
        extra_body={"return_token_ids": True, "stream_options": None},
    )
    assert ids.choices[0].token_ids == expected_tokens(list(b"hello"), 12)
    assert ids.choices[0].text == made.choices[0].text


def test_several_prompts_and_completions(client):
    prompts = ["one", "two", "three"]
    made = client.completions.create(model="hash", prompt=prompts, temperature=0, max_tokens=6, n=2)
    assert [c.index for c in made.choices] == [0, 1, 2, 3, 4, 5]
    single = [
        client.completions.create(model="hash", prompt=p, temperature=0, max_tokens=6)
        .choices[0]
        .text
        for p in prompts
    ]
    assert [c.text for c in made.choices] == [t for t in single for _ in range(2)]
    assert made.usage.completion_tokens == 36
    streamed = {}
    for chunk in client.completions.create(
        model="hash", prompt=prompts, temperature=0, max_tokens=6, n=2, stream=True
    ):
        for choice in chunk.choices:
            streamed[choice.index] = streamed.get(choice.index, "") + choice.text
    assert [streamed[i] for i in range(6)] == [t for t in single for _ in range(2)]


def test_echo_with_logprobs_scores_the_prompt(client):
    made = client.completions.create(
        model="hash",
        prompt=[list(b"abcd"), list(b"xy")],
        temperature=0,
        max_tokens=1,
        echo=True,
        logprobs=2,
    )
    first, second = made.choices
    assert first.text.startswith("abcd")
    assert first.logprobs.tokens[:4] == ["a", "b", "c", "d"]
    assert len(first.logprobs.token_logprobs) == 5
    assert len(second.logprobs.token_logprobs) == 3
    assert first.logprobs.token_logprobs[0] == 0.0
    assert first.logprobs.top_logprobs[0] == {}
    assert all(v < 0 for v in first.logprobs.token_logprobs[1:])
    assert first.logprobs.text_offset[:4] == [0, 1, 2, 3]
    top = first.logprobs.top_logprobs[4]
    assert max(top, key=top.get) == first.logprobs.tokens[4]
    alone = client.completions.create(
        model="hash", prompt="abcd", temperature=0, max_tokens=0, echo=True, logprobs=1
    ).choices[0]
    assert alone.text == "abcd"
    assert alone.logprobs.token_logprobs == pytest.approx(first.logprobs.token_logprobs[:4])


def test_streamed_completion_equals_the_whole_one(client):
    whole = client.completions.create(
        model="hash",
        prompt="stream me",
        temperature=0.9,
        seed=5,
        max_tokens=60,
        extra_body={"ignore_eos": True},
    )
    stream = client.completions.create(
        model="hash",
        prompt="stream me",
        temperature=0.9,
        seed=5,
        max_tokens=60,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    chunks = list(stream)
    assert "".join(c.choices[0].text for c in chunks[:-1]) == whole.choices[0].text
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 60
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-1] == "length"


def test_chat(client):
    made = client.chat.completions.create(
        model="hash",
        messages=[{"role": "user", "content": "hi"}],
        temperature=0,
        max_completion_tokens=10,
        logprobs=True,
        top_logprobs=3,
    )
    message = made.choices[0].message
    assert message.role == "assistant"
    assert message.content == text_after(chat_prompt("hi"), 10)
    assert len(made.choices[0].logprobs.content) == 10
    first = made.choices[0].logprobs.content[0]
    assert len(first.top_logprobs) == 3
    assert first.logprob == first.top_logprobs[0].logprob
    parts = client.chat.completions.create(
        model="hash",
        messages=[{"role": "user", "content": [{"type": "text", "text": t} for t in "hi"]}],
        temperature=0,
        max_tokens=10,
    )
    assert parts.choices[0].message.content == message.content


def test_streamed_chat(client):
    chunks = list(
        client.chat.completions.create(
            model="hash",
            messages=[{"role": "user", "content": "hi"}],
            temperature=0,
            max_tokens=20,
            stream=True,
            stream_options={"include_usage": True, "continuous_usage_stats": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks[:-1])
    assert text == text_after(chat_prompt("hi"), 20)
    counts = [c.usage.completion_tokens for c in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 20


def test_stop_strings(client):
    text = text_after("stop here", 60)
    stop = next(text[i : i + 2] for i in range(8, 50) if text[i : i + 2].isascii())
    made = client.completions.create(
        model="hash", prompt="stop here", temperature=0, max_tokens=60, stop=["zzzz", stop]
    ).choices[0]
    assert made.text == text[: text.index(stop)]
    assert made.finish_reason == "stop"


def test_structured_output(client):
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["ann", "bob"]}, "ok": {"type": "boolean"}},
        "required": ["name", "ok"],
        "additionalProperties": False,
    }
    for temperature in (0.0, 1.5):
        made = client.chat.completions.create(
            model="hash",
            messages=[{"role": "user", "content": "json please"}],
            temperature=temperature,
            seed=3,
            max_tokens=200,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "person", "schema": schema, "strict": True},
            },
        )
        parsed = json.loads(made.choices[0].message.content)
        assert parsed["name"] in ("ann", "bob")
        assert isinstance(parsed["ok"], bool)
        assert made.choices[0].finish_reason == "stop"
    regex = client.completions.create(
        model="hash",
        prompt="digits",
        max_tokens=20,
        extra_body={"structured_outputs": {"regex": "[0-9]{4}-[ab]+c"}},
        temperature=0,
    )
    assert regex.choices[0].text[:5].replace("-", "").isdigit()
    with pytest.raises(openai.BadRequestError, match="invalid regex"):
        client.completions.create(
            model="hash", prompt="x", extra_body={"structured_outputs": {"regex": "("}}
        )


def test_async_client(server):
    async def main():
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0
        ) as client:
            prompts = [f"prompt {i}" for i in range(20)]

            async def one(prompt):
                made = await client.completions.create(
                    model="hash", prompt=prompt, temperature=0, max_tokens=10, stream=True
                )
                return "".join([c.choices[0].text async for c in made])

            texts = await asyncio.gather(*map(one, prompts))
            assert texts == [text_after(p, 10) for p in prompts]

    asyncio.run(main())


def test_errors_have_openai_types(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="hash", prompt="x" * 600)
    assert caught.value.code == "context_length_exceeded"
    assert "600 tokens" in str(caught.value)
    assert "512" in str(caught.value)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="hash", messages=[])
    assert caught.value.param == "messages"
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="hash", prompt="x", temperature=-1)
