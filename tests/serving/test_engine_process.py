"""The engine in a process of its own: whatever happens to either, nobody waits in vain."""

import asyncio
import gc
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import httpx
import msgspec
import pytest

from quatom.engine.outputs import SequenceDelta, Timestamps, TokenLogprobs
from quatom.engine.sampling import SamplingParams, StructuredOutput
from quatom.engine.structured.compiler import Compilation
from quatom.errors import EngineError, QuatomError, QueueFullError, RequestError
from quatom.serving import messages
from quatom.serving.engine_launch import EnginePlan, EngineProcess
from quatom.serving.engine_state import EngineStats
from quatom.serving.engine_worker import Worker
from quatom.serving.generation import Generation, Service
from quatom.serving.process_engine import ProcessEngine
from tests.serving.conftest import (
    process_engine,
    running_server,
    wait_until,
)
from tests.serving.engines import make_engine

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 2.0
"""Within which every open request must have its error."""


def completion(prompt="hello", **fields):
    return {"prompt": prompt, "temperature": 0, "max_tokens": 400, **fields}


class Clients:
    """Requests under way, some streamed; what each was told, and when."""

    def __init__(self, url, count=8):
        self.ends = []
        self.begun = threading.Semaphore(0)
        bodies = [completion(stream=i % 2 == 0) for i in range(count)]
        # To compile a constraint takes seconds at first: this one is still being checked.
        bodies.append(completion(structured_outputs={"regex": "a+"}))
        self.threads = [threading.Thread(target=self._ask, args=(url, body)) for body in bodies]
        for thread in self.threads:
            thread.start()
        for _ in bodies:
            assert self.begun.acquire(timeout=30)

    def _ask(self, url, body):
        stream, text = body.get("stream", False), ""
        if not stream:
            self.begun.release()
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as response:
            for part in response.iter_text():
                if stream and not text:
                    self.begun.release()
                text += part
        self.ends.append((time.monotonic(), response.status_code, stream, text))

    def check(self, since, reason):
        """Everybody got the error in time."""
        for thread in self.threads:
            thread.join(timeout=30)
        assert len(self.ends) == len(self.threads)
        for at, status, stream, text in self.ends:
            assert at - since < SECONDS
            if stream:
                assert text.endswith("data: [DONE]\n\n")
                text = text.split("\n\n")[-3].removeprefix("data: ")
            else:
                assert status == 503
            error = json.loads(text)["error"]
            assert reason in error["message"]
            assert error["code"] == "engine_error"


def alive(pid):
    """Whether a process runs; one that nobody has waited for does not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def children(pid):
    """Processes that a process has started."""
    lists = [task.read_text() for task in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(word) for line in lists for word in line.split()]


def kill(server):
    """Kill the engine's process with requests under way; they must be told."""
    engine = server.app.state.async_engine
    clients = Clients(server.url)
    wait_until(lambda: engine._preparing and children(engine.pid))
    helpers = children(engine.pid)
    now = time.monotonic()
    os.kill(engine.pid, signal.SIGKILL)
    clients.check(now, "the engine's process was killed by SIGKILL")
    wait_until(lambda: not any(map(alive, helpers)))


def test_a_killed_engine_fails_every_request_and_the_server():
    stopped = threading.Event()
    with running_server(process_engine(step_seconds=0.02)) as server:
        server.app.state.async_engine.on_stop = stopped.set
        kill(server)
        assert stopped.is_set()
        health = httpx.get(f"{server.url}/health")
        assert health.status_code == 503
        assert "SIGKILL" in health.json()["error"]["message"]
        answer = httpx.post(f"{server.url}/v1/completions", json=completion())
        assert answer.status_code == 503


@pytest.mark.parametrize(
    ("factory", "arguments", "error"),
    [
        ("refuse_to_start", {"message": "no model"}, "^no model$"),
        ("vanish", {}, "killed by SIGKILL while it started.*too little memory"),
    ],
)
def test_what_goes_wrong_at_the_start_is_said_as_if_it_had_happened_here(factory, arguments, error):
    plan = EnginePlan(factory=f"tests.serving.no_engines:{factory}", arguments=arguments)
    process = EngineProcess(plan)
    with pytest.raises(EngineError, match=error):
        process.wait_until_ready()
    assert process.popen.returncode in (1, -signal.SIGKILL)
    assert not process._folder.exists()


CHAT = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0, "max_tokens": 9}
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
SAME = [
    ("/v1/completions", {"prompt": ["a", "bc"], "n": 2, "logprobs": 3, "echo": True}),
    ("/v1/completions", {"prompt": "a", "stop": ["x", "y"], "bad_words": ["z"], "stream": True}),
    ("/v1/completions", {"prompt": "a", "logit_bias": {"7": 99}, "seed": 3, "temperature": 1}),
    ("/v1/completions", {"prompt": "a", "structured_outputs": {"choice": ["one", "two"]}}),
    ("/v1/completions", {"prompt": "a", "structured_outputs": {"regex": "("}}),
    ("/v1/completions", {"prompt": "a", "max_tokens": 9999}),
    ("/v1/completions", {"prompt": [70_000]}),
    ("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 2, "stream": True}),
    (
        "/v1/chat/completions",
        {
            **CHAT,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "a", "schema": SCHEMA},
            },
        },
    ),
    ("/v1/responses", {"input": "hello", "temperature": 0, "max_output_tokens": 9}),
    ("/v1/embeddings", {"input": ["a", "longer"]}),
    ("/tokenize", {"prompt": "hello"}),
    ("/detokenize", {"tokens": [299, 7]}),
]


def answer(server, path, body):
    """Status and text, without what is different each time."""
    body = {"temperature": 0, **body} if path == "/v1/completions" else body
    got = httpx.post(server.url + path, json=body, timeout=60)
    varying = r'"(id|item_id)":"[^"]*"|"(created|created_at|completed_at)":[\d.]+'
    return got.status_code, re.sub(varying, "", got.text)


@pytest.mark.parametrize(("path", "body"), SAME)
def test_an_answer_does_not_depend_on_where_the_engine_runs(server, process_server, path, body):
    assert answer(process_server, path, body) == answer(server, path, body)


ORPHAN = """
import sys, time
from tests.serving.conftest import process_engine
print(process_engine().pid, flush=True)
time.sleep(600)
"""


def test_an_engine_never_outlives_its_server():
    server = subprocess.Popen(
        [sys.executable, "-c", ORPHAN],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"},
        stdout=subprocess.PIPE,
        text=True,
    )
    pid = int(server.stdout.readline())
    assert alive(pid)
    for number in (signal.SIGTERM, signal.SIGINT):  # those are for the server to act upon
        os.kill(pid, number)
    time.sleep(0.3)
    assert alive(pid)
    server.kill()
    server.wait()
    wait_until(lambda: not alive(pid), seconds=SECONDS)


FULL = {
    "request_id": "a-0",
    "index": 1,
    "token_ids": (5, 6),
    "text": "你 \x00",
    "logprobs": (TokenLogprobs(5, -0.5, ((5, -0.5), (7, float("-inf")))),),
    "prompt_logprobs": (TokenLogprobs(1, -1.5),),
    "num_cached": 3,
    "num_cache_written": 16,
    "num_prompt": 4,
    "num_generated": 2,
    "interval": 0.25,
    "finish_reason": "stop",
    "stop_reason": "\n",
    "times": Timestamps(arrival=1.0, scheduled=2.0, first_token=3.0, last_token=4.5),
    "error": "none",
    "hidden": (0.5, -1.0),
    "refused": True,
}


def sent(message, decoder):
    return decoder.decode(messages.ENCODER.encode(message))


def test_every_field_of_a_delta_arrives():
    assert FULL.keys() == {f.name for f in fields(SequenceDelta)}
    delta = SequenceDelta(**FULL)
    defaults = SequenceDelta(request_id="", index=0, token_ids=(), text="")
    for stop in ("\n", 17, None):
        delta.stop_reason = stop
        step = messages.Step([delta, defaults], EngineStats(running=1), 2, ["a-0"])
        assert sent(step, messages.REPORT_DECODER) == step


def test_every_field_of_sampling_parameters_arrives():
    params = SamplingParams(
        n=2,
        max_tokens=None,
        temperature=0.5,
        top_p=0.25,
        top_k=3,
        min_p=0.125,
        repetition_penalty=1.5,
        presence_penalty=-0.5,
        frequency_penalty=0.5,
        logit_bias={5: 1.5, 70_000: -100},
        seed=-(2**63),
        stop=["a", "é"],
        stop_token_ids=[4],
        include_stop_str_in_output=True,
        ignore_eos=True,
        skip_special_tokens=False,
        logprobs=0,
        prompt_logprobs=2,
        shown_token_ids=[9, 8],
        structured=StructuredOutput("regex", "a+"),
    )
    tried = [
        params,
        SamplingParams(),
        SamplingParams(min_tokens=3, detokenize=False),
        SamplingParams(bad_words=["b", "ü"]),
        SamplingParams(max_tokens=0, embed=True),
    ]
    for f in fields(SamplingParams):
        assert len({repr(getattr(given, f.name)) for given in tried}) > 1, f.name
    for given in tried:
        made = sent(messages.Prepare("a", [1, 2], given), messages.COMMAND_DECODER)
        assert made.params == given
        assert type(made.params.logit_bias) is type(given.logit_bias)


@pytest.mark.parametrize("kind", [RequestError, QueueFullError, EngineError, QuatomError])
def test_an_error_keeps_its_class(kind):
    refused = messages.Refused("a", messages.Failure.of(kind("why")))
    error = sent(refused, messages.REPORT_DECODER).failure.error()
    assert (type(error), str(error)) == (kind, "why")
    assert str(messages.Failure.of(ZeroDivisionError("x")).error()) == "ZeroDivisionError: x"
    no_text = sent(
        messages.NotStarted(messages.Failure.of(OSError("\udcff"))), messages.REPORT_DECODER
    )
    assert str(no_text.failure.error()) == r"\udcff"


class FakeProcess:
    """Takes note of commands; answers each Prepare at once."""

    def __init__(self):
        from quatom.serving.engine_state import facts_of

        self.facts = facts_of(make_engine())
        self.commands = []
        self.under_way = []
        self.engine = None

    def send(self, command):
        self.commands.append(command)
        if isinstance(command, messages.Prepare):
            self.under_way.append(len(self.engine._preparing))
            report = messages.Prepared(command.request_id, command.params.n)
            asyncio.get_running_loop().call_soon(self.engine._take, report)


def test_a_request_that_nobody_runs_is_dropped():
    async def main():
        process = FakeProcess()
        engine = ProcessEngine(process, None, plan=None)
        process.engine, engine._event_loop = engine, asyncio.get_running_loop()
        request = await engine.make_request("unused", [1], SamplingParams())
        del request
        gc.collect()
        await asyncio.sleep(0)
        assert process.commands[-1] == messages.Drop("unused")
        used = await engine.make_request("used", [1], SamplingParams(n=2))
        stream = engine.stream(used)
        reading = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        assert process.commands[-1] == messages.Run("used")
        assert engine.num_waiting == 1
        engine._take(messages.Step([], EngineStats(running=1), 0, ["used"]))
        assert engine.num_waiting == 0
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await stream.aclose()
        assert process.commands[-1] == messages.Drop("used")
        preparing = asyncio.ensure_future(engine.make_request("late", [1], SamplingParams()))
        await asyncio.sleep(0)
        assert engine.num_waiting == 1  # so that a burst cannot overfill the queue
        preparing.cancel()
        await asyncio.gather(preparing, return_exceptions=True)
        assert process.commands[-1] == messages.Drop("late")
        assert engine._preparing == {}
        assert engine.num_waiting == 0
        process.send = lambda command: 1 // 0
        with pytest.raises(ZeroDivisionError):
            await engine.make_request("unsent", [1], SamplingParams())
        assert engine._preparing == {}

    asyncio.run(main())


def test_prompts_of_one_request_are_checked_together():
    async def main():
        process = FakeProcess()
        engine = ProcessEngine(process, None, plan=None)
        process.engine, engine._event_loop = engine, asyncio.get_running_loop()
        service = Service(engine, encoder=None, model_names=("m",))
        generation = Generation(service, "cmpl", "m", SamplingParams(), http=None)
        await generation.prepare([[1], [2, 3], [4]])
        # The first one alone, so that the others find its constraint compiled.
        assert process.under_way == [1, 1, 2]
        assert [command.prompt_ids for command in process.commands] == [[1], [2, 3], [4]]
        assert [r.request_id for r in generation.requests] == [
            f"{generation.id}-{i}" for i in range(3)
        ]
        assert [o.prompt_token_ids for o in generation.outputs] == [[1], [2, 3], [4]]

    asyncio.run(main())


@pytest.mark.parametrize("error", [EngineError("no folder"), OSError("no folder")])
def test_a_server_whose_engine_cannot_be_started_anew_ends(monkeypatch, error):
    def start(plan):
        raise error

    monkeypatch.setattr("quatom.serving.process_engine.EngineProcess", start)
    stops = []
    engine = ProcessEngine(FakeProcess(), None, plan=EnginePlan(factory="a:b"))
    engine.on_stop = lambda: stops.append(engine.error)
    asyncio.run(engine._restart())
    assert stops == ["the engine could not be started anew: no folder"]


@pytest.mark.parametrize(
    ("status", "words"),
    [(3, "ended with status 3"), (-9, "was killed by SIGKILL"), (-40, "was killed by signal 40")],
)
def test_every_ending_has_words(status, words):
    process = object.__new__(EngineProcess)
    process.popen = SimpleNamespace(returncode=status)
    assert process.ending == f"the engine's process {words}"


def test_a_process_that_cannot_read_its_commands_says_why_and_ends(tmp_path, monkeypatch):
    for name in ("zmq", "torch", "msgspec"):  # files of the current folder are not modules
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(tmp_path)
    process = EngineProcess(EnginePlan(factory="tests.serving.engines:make_engine"))
    process.wait_until_ready()
    # Ctrl-C in a terminal goes to the server's group.
    assert os.getpgid(process.popen.pid) != os.getpgid(0)
    process._commands.send(b"\xc1")  # what msgpack never uses
    reports = []
    while process.reports.poll(10_000):
        reports.append(process.receive())
        if isinstance(reports[-1], messages.Stopped):
            break
    process.close()
    assert "malformed" in reports[-1].message
    assert process.popen.returncode == 1


class Reports(list):
    def send(self, report):
        self.append(report)


def test_the_worker_keeps_nothing_that_was_dropped(monkeypatch):
    reports = Reports()
    worker = Worker(make_engine(), reports)
    worker._prepare(messages.Prepare("a", [1, 2], SamplingParams(n=2)))
    assert reports.pop() == messages.Prepared("a", 2)
    worker._drop("a")
    assert not worker._prepared
    assert worker.loop.commands.empty()
    worker._run("a")
    assert "started anew" in reports.pop().failure.message
    compiling, cancelled = Compilation(StructuredOutput("json_object")), []
    compiling.cancel = lambda: cancelled.append("b")
    monkeypatch.setattr(worker.loop.engine.requests, "compile", lambda wanted: compiling)
    params = SamplingParams(structured=compiling.wanted)
    worker._prepare(messages.Prepare("b", [1], params))
    worker._drop("b")
    assert cancelled == ["b"]
    compiling.future.set_result(None)  # too late
    assert not worker._prepared
    assert not worker._compiling
    assert reports == []
    worker._prepare(messages.Prepare("c", [], SamplingParams()))
    assert reports.pop().failure.kind == "RequestError"
    monkeypatch.setattr(worker.loop.engine.requests, "compile", lambda wanted: 1 // 0)
    worker._prepare(messages.Prepare("d", [1], params))  # a fault of ours is one request's alone
    assert reports.pop().failure.message.startswith("ZeroDivisionError")


def test_commands_that_make_no_sense_are_refused():
    with pytest.raises(msgspec.ValidationError):
        messages.COMMAND_DECODER.decode(messages.ENCODER.encode(["Prepare", 1, 2, 3]))
