"""run-batch: the same answers as over HTTP, each once, also when it is interrupted."""

import asyncio
import json

import pytest

from quatom.errors import RequestError
from quatom.serving.app import ServerOptions, create_app
from quatom.serving.batch_file import answered_ids, read_batch, run_batch
from tests.engine.doubles import byte_tokenizer, expected_tokens
from tests.serving.conftest import assert_idle, make_engine

TOKENIZER = byte_tokenizer()


def line(custom_id, prompt, **body):
    fields = {"model": "hash", "prompt": prompt, "temperature": 0, "max_tokens": 6, **body}
    request = {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": fields}
    return json.dumps(request) + "\n"


def answer_all(source, target):
    engine = make_engine()
    app = create_app(engine, ServerOptions(model_names=("hash",)))
    counts = asyncio.run(run_batch(app, read_batch(source), target, concurrency=8))
    assert_idle(engine)
    return counts


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
    answers = {a["custom_id"]: a for a in map(json.loads, target.read_text().splitlines())}
    assert set(answers) == {*prompts, "bad", "chat"}
    for custom_id, prompt in prompts.items():
        response = answers[custom_id]["response"]
        assert response["status_code"] == 200
        want = TOKENIZER.decode(expected_tokens(TOKENIZER.encode(prompt), 6))
        assert response["body"]["choices"][0]["text"] == want
    assert answers["bad"]["response"]["status_code"] == 400
    assert "error" in answers["bad"]["response"]["body"]


def test_an_interrupted_batch_goes_on(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(line(f"id-{i}", f"prompt {i}") for i in range(10)))
    answer_all(source, target)
    whole = target.read_bytes().splitlines(keepends=True)
    target.write_bytes(b"".join(whole[:4]) + whole[4][:25])  # the power went while writing
    counts = answer_all(source, target)
    assert (counts.completed, counts.skipped) == (6, 4)
    assert answered_ids(target) == {f"id-{i}" for i in range(10)}
    assert len(target.read_bytes().splitlines()) == 10
    assert answer_all(source, target).skipped == 10


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1: not JSON"),
        ("[]", "string custom_id"),
        (line("a", "x") + line("a", "y"), "line 2: custom_id 'a' occurs twice"),
        (line("a", "x").replace("POST", "GET"), "method must be POST"),
        (line("a", "x").replace("/v1/completions", "/x"), "url one of /v1/completions"),
        (line("a", "x", stream=True), "not ask for a stream"),
    ],
)
def test_a_wrong_file_is_refused_with_the_line(tmp_path, text, message):
    path = tmp_path / "in.jsonl"
    path.write_text(text)
    with pytest.raises(RequestError, match=message):
        read_batch(path)


def test_an_output_that_is_something_else_is_not_overwritten(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text("my notes\n")
    with pytest.raises(RequestError, match="give another output file"):
        answered_ids(path)
    assert path.read_text() == "my notes\n"
