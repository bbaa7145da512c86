"""Programs of other people that use a server like ours: LangChain, LiteLLM, Open WebUI.

LangChain and LiteLLM are not among the development packages: `scripts/judges.sh` makes an
environment with them and runs this file in it. Open WebUI's requests are replayed as it sends them.
"""

import json

import httpx
import pytest

from tests.serving.scripted import scripted_server
from tests.serving.templates import QWEN3

THOUGHT = "<think>\nI need the weather.\n</think>\n\n"
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "degrees": {"type": "integer"}},
    "required": ["city", "degrees"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}


def call(city):
    return (
        f'<tool_call>\n{{"name": "get_weather", "arguments": {{"city": "{city}"}}}}\n</tool_call>'
    )


def answer(prompt):
    """What the prompt itself writes of the answer, and the rest."""
    return ("<think>\n\n</think>\n\n" if "/no_think" in prompt else "") + rest_of(prompt)


def rest_of(prompt):
    """Asks for two cities, one after the other, and then compares them."""
    asked = prompt.rpartition("<user>user:")[2]
    if "JSON" in asked:
        return '{"city": "Bern", "degrees": 12}'
    if "weather" not in asked:
        return "Hello! How can I help?"
    if "Bern: 12" not in asked:
        return THOUGHT + call("Bern")
    if "Basel: 15" not in asked:
        return call("Basel")
    return "Basel is warmer than Bern."


@pytest.fixture(scope="module")
def server():
    with scripted_server(QWEN3, answer, max_position=4096) as running:
        yield running


@pytest.fixture
def langchain(server):
    """LangChain's chat model."""
    langchain_openai = pytest.importorskip("langchain_openai")
    return langchain_openai.ChatOpenAI(
        base_url=f"{server.url}/v1", api_key="none", model="hash", temperature=0, max_retries=0
    )


def get_weather(city: str) -> str:
    """Weather of a city."""
    return f"{city}: { {'Bern': 12, 'Basel': 15}[city] } °C"


def test_langchain_answers_and_streams(langchain):
    assert langchain.invoke("hi").content == "Hello! How can I help?"
    chunks = list(langchain.stream("hi", stream_usage=True))
    assert "".join(chunk.content for chunk in chunks) == "Hello! How can I help?"
    usage = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
    assert usage[-1]["output_tokens"] > 0


def test_langchain_agent_loop_of_two_calls(langchain):
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import tool

    weather = tool(get_weather)
    model = langchain.bind_tools([weather])
    messages = [HumanMessage("weather in Bern and Basel?")]
    cities = []
    for _ in range(5):
        made = model.invoke(messages)
        messages.append(made)
        if not made.tool_calls:
            break
        for wanted in made.tool_calls:
            cities.append(wanted["args"]["city"])
            messages.append(ToolMessage(weather.invoke(wanted["args"]), tool_call_id=wanted["id"]))
    assert cities == ["Bern", "Basel"]
    assert messages[-1].content == "Basel is warmer than Bern."


def test_langchain_streams_calls(langchain):
    made = None
    for chunk in langchain.bind_tools([TOOL]).stream("weather in Bern?"):
        made = chunk if made is None else made + chunk
    assert made.tool_calls[0]["name"] == "get_weather"
    assert made.tool_calls[0]["args"] == {"city": "Bern"}
    assert made.invalid_tool_calls == []


@pytest.mark.parametrize("choice", ["required", "any", "get_weather"])
def test_langchain_forces_calls(langchain, choice):
    # Such a call may be preceded by reasoning, which this model would never end.
    quiet = langchain.bind(extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    model = quiet.bound.bind_tools([TOOL], tool_choice=choice, **quiet.kwargs)
    made = model.invoke("weather?", max_tokens=300)
    assert made.tool_calls[0]["name"] == "get_weather"


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
def test_langchain_structured_output(langchain, method):
    model = langchain.with_structured_output({"title": "Weather", **SCHEMA}, method=method)
    quiet = {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}
    made = model.invoke("JSON please", max_tokens=300, **quiet)
    assert isinstance(made["city"], str)
    assert isinstance(made["degrees"], int)


def test_langchain_through_the_responses_api(server, langchain):
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(
        base_url=f"{server.url}/v1",
        api_key="none",
        model="hash",
        temperature=0,
        max_retries=0,
        use_responses_api=True,
    ).bind_tools([TOOL])
    made = model.invoke("weather in Bern?")
    assert made.tool_calls[0]["args"] == {"city": "Bern"}
    whole = None
    for chunk in model.stream("weather in Bern?"):
        whole = chunk if whole is None else whole + chunk
    assert whole.tool_calls[0]["args"] == {"city": "Bern"}


def test_langchain_embeddings(server, langchain):
    from langchain_openai import OpenAIEmbeddings

    embeddings = OpenAIEmbeddings(
        base_url=f"{server.url}/v1", api_key="none", model="hash", check_embedding_ctx_length=False
    )
    assert len(embeddings.embed_documents(["a", "b"])) == 2


@pytest.fixture
def litellm(server, monkeypatch):
    """LiteLLM's completion(), pointed at the server."""
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    litellm = pytest.importorskip("litellm")
    common = {"api_base": f"{server.url}/v1", "api_key": "none", "temperature": 0}

    def complete(text, **options):
        messages = options.pop("messages", [{"role": "user", "content": text}])
        return litellm.completion(model="hosted_vllm/hash", messages=messages, **common, **options)

    return complete


def test_litellm_answers_and_streams(litellm):
    assert litellm("hi").choices[0].message.content == "Hello! How can I help?"
    chunks = list(litellm("hi", stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "Hello! How can I help?"


def test_litellm_agent_loop_of_two_calls(litellm):
    messages = [{"role": "user", "content": "weather in Bern and Basel?"}]
    cities = []
    for _ in range(5):
        message = litellm("", messages=messages, tools=[TOOL]).choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        if not message.tool_calls:
            break
        for wanted in message.tool_calls:
            city = json.loads(wanted.function.arguments)["city"]
            cities.append(city)
            result = {"role": "tool", "tool_call_id": wanted.id, "content": get_weather(city)}
            messages.append(result)
    assert cities == ["Bern", "Basel"]
    assert message.content == "Basel is warmer than Bern."


def test_litellm_sees_reasoning(litellm):
    message = litellm("weather in Bern?", tools=[TOOL]).choices[0].message
    assert message.reasoning_content == "I need the weather."
    reasoning = "".join(
        getattr(chunk.choices[0].delta, "reasoning_content", None) or ""
        for chunk in litellm("weather in Bern?", tools=[TOOL], stream=True)
    )
    assert reasoning == "I need the weather."


class TestOpenWebUI:
    """What Open WebUI sends to an OpenAI connection."""

    HEADERS = {"Authorization": "Bearer none", "Content-Type": "application/json"}  # noqa: RUF012

    def post(self, server, path, body):
        return httpx.post(f"{server.url}/v1{path}", json=body, headers=self.HEADERS, timeout=30)

    def test_the_connection_check(self, server):
        made = httpx.get(f"{server.url}/v1/models", headers=self.HEADERS)
        assert made.status_code == 200
        assert [model["id"] for model in made.json()["data"]] == ["hash", "alias"]
        assert "error" not in made.json()

    def test_a_chat(self, server):
        body = {
            "stream": True,
            "model": "hash",
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "hi"},
            ],
            "stream_options": {"include_usage": True},
        }
        text = self.post(server, "/chat/completions", body).text
        lines = [line for line in text.split("\n") if line]
        assert lines[-1] == "data: [DONE]"
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
        words = [c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"]]
        assert "".join(words) == "Hello! How can I help?"
        assert chunks[-1]["usage"]["total_tokens"] > 0

    def test_native_tools(self, server):
        body = {
            "stream": True,
            "model": "hash",
            "messages": [{"role": "user", "content": "weather in Bern?"}],
            "tools": [TOOL],
        }
        text = self.post(server, "/chat/completions", body).text
        calls = [
            call
            for line in text.split("\n")
            if line.startswith("data: {")
            for call in json.loads(line[6:])["choices"][0]["delta"].get("tool_calls", [])
        ]
        assert "".join(c["function"]["arguments"] for c in calls) == '{"city": "Bern"}'

    def test_a_title(self, server):
        body = {
            "model": "hash",
            "messages": [{"role": "user", "content": "### Task:\nGenerate a title as JSON."}],
            "stream": False,
            "max_completion_tokens": 1000,
        }
        made = self.post(server, "/chat/completions", body).json()
        assert json.loads(made["choices"][0]["message"]["content"])["city"] == "Bern"

    def test_embeddings_of_documents(self, server):
        made = self.post(server, "/embeddings", {"input": ["a", "b"], "model": "hash"}).json()
        assert [len(entry["embedding"]) for entry in made["data"]] == [2, 2]
