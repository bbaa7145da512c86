"""run-batch: the same answers as over HTTP, each once, and never at the cost of a file."""

import asyncio
import errno
import json
import os
from dataclasses import astuple
from types import SimpleNamespace

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from quatom.errors import EngineError, RequestError
from quatom.serving.app import ServerOptions, create_app
from quatom.serving.batch_file import BadLine, make_answer, read_batch
from quatom.serving.batch_output import AnswerFile, check_output, open_output
from quatom.serving.batch_run import run_batch
from tests.engine.doubles import byte_tokenizer, expected_tokens
from tests.serving.conftest import assert_idle, make_engine

TOKENIZER = byte_tokenizer()


def line(custom_id, prompt, **body):
    fields = {"model": "hash", "prompt": prompt, "temperature": 0, "max_tokens": 6, **body}
    request = {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": fields}
    return json.dumps(request) + "\n"


def answers_of(path):
    return [json.loads(text) for text in path.read_text().splitlines()]


def answer_all(source, target):
    engine = make_engine()
    app = create_app(engine, ServerOptions(model_names=("hash",)))
    counts = asyncio.run(run_batch(app, read_batch(source), target, concurrency=8))
    assert_idle(engine)
    return counts


def make_echo(statuses=()):
    """An application that answers with the prompt, or for prompt number i with statuses[i]."""
    app = FastAPI()
    app.state.async_engine = SimpleNamespace(error=None)
    app.state.prompts = []

    @app.post("/v1/completions")
    async def completions(http: Request):
        prompt = (await http.json())["prompt"]
        app.state.prompts.append(prompt)
        status = dict(statuses).get(prompt, 200)
        if status is None:
            raise ZeroDivisionError("integer division or modulo by zero")
        return JSONResponse({"text": prompt}, status_code=status)

    return app


def echo_all(source, target, statuses=()):
    app = make_echo(statuses)
    counts = asyncio.run(run_batch(app, read_batch(source), target, concurrency=2))
    return counts, app.state.prompts


@pytest.fixture
def files(tmp_path):
    """(source, target) of a batch of four requests."""
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(line(f"id-{i}", f"prompt {i}") for i in range(4)))
    return source, target


def test_every_request_is_answered(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts = {f"id-{i}": f"prompt {i}" for i in range(30)}
    chat = {
        "custom_id": "chat",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "hash", "messages": [{"role": "user", "content": "x"}], "max_tokens": 3},
    }
    bad = line("bad", "x", max_tokens=-1)
    source.write_text(
        "".join(line(i, p) for i, p in prompts.items()) + bad + "\n" + json.dumps(chat)
    )
    counts = answer_all(source, target)
    assert (counts.completed, counts.failed, counts.skipped) == (31, 1, 0)
    answers = {a["custom_id"]: a for a in answers_of(target)}
    assert set(answers) == {*prompts, "bad", "chat"}
    for custom_id, prompt in prompts.items():
        response = answers[custom_id]["response"]
        assert response["status_code"] == 200
        want = TOKENIZER.decode(expected_tokens(TOKENIZER.encode(prompt), 6))
        assert response["body"]["choices"][0]["text"] == want
    assert answers["bad"]["response"]["status_code"] == 400
    assert "error" in answers["bad"]["response"]["body"]
    assert answer_all(source, target).skipped == 32


BAD = {
    "broken JSON": ("{", None, "invalid_json_line"),
    "cut UTF-8": (b'{"custom_id": "\xe4\xbd', None, "invalid_json_line"),
    "nesting without end": ("[" * 100_000, None, "invalid_json_line"),
    "no object": ("[]", None, "missing_custom_id"),
    "no custom_id": (line("a", "x").replace("custom_id", "id"), None, "missing_custom_id"),
    "a number for a custom_id": (line(5, "x"), None, "missing_custom_id"),
    "another method": (line("b", "x").replace("POST", "GET"), "b", "invalid_method"),
    "an unknown url": (line("b", "x").replace("/v1/completions", "/x"), "b", "invalid_url"),
    "no url": (line("b", "x").replace('"url"', '"uri"'), "b", "invalid_url"),
    "no body": (line("b", "x").replace('"body"', '"text"'), "b", "invalid_body"),
    "a stream": (line("b", "x", stream=True), "b", "invalid_body"),
    "a custom_id twice": (line("a", "y"), "a", "duplicate_custom_id"),
}


@pytest.mark.parametrize("name", sorted(BAD))
def test_a_bad_line_is_answered_in_its_place(tmp_path, name):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    text, custom_id, code = BAD[name]
    text = text if isinstance(text, bytes) else text.encode()
    lines = [line("a", "x").encode(), b"\n", text.strip(), b"\n", line("c", "z").encode()]
    source.write_bytes(b"".join(lines))
    for run in range(2):
        counts, prompts = echo_all(source, target)
        assert astuple(counts) == [(2, 1, 0), (0, 0, 3)][run]
        assert sorted(prompts) == [["x", "z"], []][run]
    found = answers_of(target)
    (bad,) = (answer for answer in found if answer["error"] is not None)
    assert bad["custom_id"] == custom_id
    assert (bad["error"]["code"], bad["error"]["line"]) == (code, 3)
    assert bad["error"]["message"].startswith("line 3: ")
    assert bad["response"]["status_code"] == 400
    assert bad["response"]["body"]["error"]["code"] == code
    assert sorted(a["custom_id"] for a in found if a is not bad) == ["a", "c"]
    # When the line has been mended, its answer takes the error's place.
    fixed = [line("a", "x"), "\n", line("b", "y"), line("c", "z")]
    source.write_text("".join(fixed))
    assert echo_all(source, target)[1] == ["y"]
    assert sorted(a["custom_id"] for a in answers_of(target)) == ["a", "b", "c"]


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_files_of_other_systems_are_read(files, ending, start):
    source, target = files
    text = source.read_text().replace("\n", ending) + ending * 2
    source.write_bytes(start + text.encode())
    assert [line.custom_id for line in read_batch(source)] == [f"id-{i}" for i in range(4)]
    echo_all(source, target)
    if ending != "\r":
        target.write_bytes(start + target.read_bytes().replace(b"\n", ending.encode()))
        assert astuple(echo_all(source, target)[0]) == (0, 0, 4)


def test_an_interrupted_batch_goes_on_at_every_byte(files):
    source, target = files
    echo_all(source, target)
    requests = read_batch(source)
    whole = target.read_bytes()
    lines = whole.splitlines(keepends=True)
    for size in [0, *range(len(whole) - len(lines[-1]) - len(lines[-2]), len(whole) + 1)]:
        target.write_bytes(whole[:size])
        with open_output(target, requests) as (found, file):
            for request in found.waiting:
                file.add(make_answer(request.custom_id, 200, {}))
        # An answer is whole if at most its line's end is missing.
        kept = sum(size >= len(b"".join(lines[: i + 1])) - 1 for i in range(4))
        assert len(found.waiting) == 4 - kept
        assert target.read_bytes().startswith(b"".join(lines[:kept]))
        assert sorted(a["custom_id"] for a in answers_of(target)) == [f"id-{i}" for i in range(4)]


@pytest.mark.parametrize("size", range(0, 60, 3))
def test_a_first_answer_that_was_cut_off_is_made_again(files, size):
    source, target = files
    source.write_text(line("a", "x"))
    echo_all(source, target)
    target.write_bytes(target.read_bytes()[:size])
    assert echo_all(source, target)[1] == ["x"]
    assert [a["custom_id"] for a in answers_of(target)] == ["a"]


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503, None])
def test_a_failed_answer_is_tried_again(files, status):
    source, target = files
    counts, _ = echo_all(source, target, {"prompt 1": status})
    assert astuple(counts) == (3, 1, 0)
    failed = {a["custom_id"]: a["response"] for a in answers_of(target)}["id-1"]
    assert failed["status_code"] == (status or 500)
    before = {a["id"] for a in answers_of(target) if a["custom_id"] != "id-1"}
    inode = target.stat().st_ino
    os.chmod(target, 0o640)
    counts, prompts = echo_all(source, target)
    assert (astuple(counts), prompts) == ((1, 0, 3), ["prompt 1"])
    answers = {a["custom_id"]: a for a in answers_of(target)}
    assert len(answers) == len(answers_of(target)) == 4
    assert before == {a["id"] for a in answers.values() if a["custom_id"] != "id-1"}
    assert answers["id-1"]["response"]["status_code"] == 200
    assert (target.stat().st_mode & 0o777, sorted(os.listdir(target.parent))) == (
        0o640,
        ["in.jsonl", "out.jsonl"],
    )
    assert target.stat().st_ino != inode


@pytest.mark.parametrize("status", [400, 404, 413])
def test_an_answer_that_refuses_the_request_stands(files, status):
    source, target = files
    echo_all(source, target, {"prompt 1": status})
    counts, prompts = echo_all(source, target)
    assert (astuple(counts), prompts) == ((0, 0, 4), [])


def test_an_exception_of_one_request_does_not_end_the_run(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    chat = {
        "custom_id": "divides",
        "url": "/v1/chat/completions",
        "body": {"model": "hash", "messages": [{"role": "user", "content": "x"}], "max_tokens": 3},
    }
    source.write_text(json.dumps(chat) + "\n" + line("a", "x") + line("b", "y"))
    engine = make_engine()
    engine.tokenizer.chat_template = "{{ 1 // 0 }}"
    app = create_app(engine, ServerOptions(model_names=("hash",)))
    asyncio.run(run_batch(app, read_batch(source), target, concurrency=2))
    status = {a["custom_id"]: a["response"]["status_code"] for a in answers_of(target)}
    assert (status["a"], status["b"]) == (200, 200)
    assert status["divides"] >= 400


def test_an_engine_that_stops_leaves_the_rest_to_another_run(files):
    source, target = files
    app = make_echo()

    def stop(succeeded):
        app.state.async_engine.error = "the engine has stopped: out of memory"

    with pytest.raises(EngineError, match="the engine has stopped: out of memory"):
        asyncio.run(run_batch(app, read_batch(source), target, concurrency=1, on_answer=stop))
    assert [a["custom_id"] for a in answers_of(target)] == ["id-0"]
    assert echo_all(source, target)[1] == ["prompt 1", "prompt 2", "prompt 3"]


def check(source, target):
    return check_output(source, target, read_batch(source))


ANSWER = b'{"id": "batch_req_1", "custom_id": "x", "response": null, "error": null}\n'
FOREIGN = {
    "notes": b"my only copy",
    "notes with an end": b"my only copy\n",
    "JSON over two lines": b'{"important": 1,\n "more": 2}',
    "JSON": b'{"important": 1}',
    "JSON lines": b'{"important": 1}\n{"important": 2}\n',
    "another batch": line("a", "x").encode(),
    "an answer, then notes": ANSWER + b"my only copy",
    "an answer, notes, an answer": ANSWER + b"notes\n" + ANSWER,
    "a broken line that is not the last": ANSWER[:30] + b"\n" + ANSWER,
    "an answer without a response": b'{"id": "batch_req_1", "custom_id": "x", "error": null}\n',
    "a status that is no number": ANSWER.replace(b"null", b'{"status_code": "200"}', 1),
    "bytes": bytes(range(256)),
    "zeros": ANSWER + bytes(100),
    "UTF-16": ANSWER.decode().encode("utf-16"),
}


@pytest.mark.parametrize("name", sorted(FOREIGN))
def test_a_file_of_something_else_is_not_touched(files, name):
    source, target = files
    target.write_bytes(FOREIGN[name])
    with pytest.raises(RequestError, match="is no answer of a batch: give another output file"):
        check(source, target)
    with pytest.raises(RequestError), open_output(target, read_batch(source)):
        pass
    assert target.read_bytes() == FOREIGN[name]


def test_answers_of_other_batches_stay(files):
    source, target = files
    other = ANSWER + ANSWER.replace(b'"error": null', b'"error": {"line": 99}') + b"\n"
    target.write_bytes(other)
    echo_all(source, target)
    assert target.read_bytes().startswith(other)
    assert len(target.read_bytes().splitlines()) == 3 + 4


def test_the_batch_file_is_never_the_output(files, tmp_path, monkeypatch):
    source, _ = files
    text = source.read_bytes()
    (tmp_path / "symlink").symlink_to(source)
    (tmp_path / "symlink of a symlink").symlink_to(tmp_path / "symlink")
    os.link(source, tmp_path / "hardlink")
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    same = ["symlink", "symlink of a symlink", "hardlink", "in.jsonl", "folder/../in.jsonl"]
    for target in (source, *(tmp_path / name for name in same), *map(source.__class__, same)):
        with pytest.raises(RequestError, match="is the batch file itself"):
            check(source, target)
        with pytest.raises(RequestError, match="is the batch file itself"):
            check(tmp_path / "symlink", target)
    assert source.read_bytes() == text


def test_an_output_that_cannot_be_written_is_refused_first(files, tmp_path, monkeypatch):
    source, target = files
    for wrong, message in [
        (tmp_path, "is no regular file"),
        (type(tmp_path)("/dev/null"), "is no regular file"),
        (tmp_path / "nowhere" / "out.jsonl", "there is no folder .*nowhere; create it"),
    ]:
        with pytest.raises(RequestError, match=message):
            check(source, wrong)
    echo_all(source, target, {"prompt 2": 500})
    monkeypatch.setattr(os, "access", lambda path, mode: os.fspath(path) != os.fspath(target))
    with pytest.raises(RequestError, match="no permission"):
        check(source, target)
    monkeypatch.setattr(os, "access", lambda path, mode: os.fspath(path) == os.fspath(target))
    with pytest.raises(RequestError, match=r"holds failed answers.*no permission to write in"):
        check(source, target)
    with pytest.raises(RequestError, match="no permission to write in"):
        check(source, tmp_path / "new.jsonl")
    assert not (tmp_path / "new.jsonl").exists()


def test_a_link_to_the_output_stays_a_link(files, tmp_path):
    source, target = files
    target.symlink_to(tmp_path / "elsewhere.jsonl")
    echo_all(source, target, {"prompt 2": 500})
    echo_all(source, target)
    assert target.is_symlink()
    assert len(answers_of(tmp_path / "elsewhere.jsonl")) == 4


def test_two_runs_do_not_share_an_output(files):
    source, target = files
    lines = read_batch(source)
    refused = pytest.raises(RequestError, match="another run-batch is writing to")
    with open_output(target, lines), refused, open_output(target, lines):
        pass
    echo_all(source, target, {"prompt 1": 500})
    refused = pytest.raises(RequestError, match="another run-batch is writing to")
    with open_output(target, lines), refused, open_output(target, lines):
        pass  # the file that took its place is held too


def test_a_full_disk_costs_no_answer(files, monkeypatch):
    source, target = files

    class FullDisk:
        """Takes two answers and a half."""

        def __init__(self, file):
            self.file, self.name, self.left = file, file.name, 550

        def write(self, data):
            if not self.left:
                raise OSError(errno.ENOSPC, "No space left on device")
            count = min(self.left, len(data), 100)
            self.left -= count
            return self.file.write(data[:count])

        def __getattr__(self, name):
            return getattr(self.file, name)

    full = AnswerFile.__init__
    monkeypatch.setattr(AnswerFile, "__init__", lambda self, file: full(self, FullDisk(file)))
    with pytest.raises(RequestError, match=r"cannot write .*out.jsonl: No space left on device"):
        echo_all(source, target)
    monkeypatch.undo()
    kept = [a["custom_id"] for a in answers_of(target)]
    assert kept == ["id-0", "id-1"]
    assert target.read_bytes().endswith(b"\n")
    assert echo_all(source, target)[1] == ["prompt 2", "prompt 3"]


def test_bad_lines_alone_need_no_application(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("{\n\n[]\n")
    lines = read_batch(source)
    assert all(isinstance(bad, BadLine) for bad in lines)
    assert not check(source, target).waiting
    counts = asyncio.run(run_batch(None, lines, target, concurrency=2))
    assert astuple(counts) == (0, 2, 0)
    assert [a["error"]["line"] for a in answers_of(target)] == [1, 3]
