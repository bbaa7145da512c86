"""`quatom run-batch`: it looks at both files before it loads a model."""

import json
import os
import subprocess
import sys
import time

import pytest


def line(custom_id, prompt="hello", **body):
    fields = {"prompt": prompt, "max_tokens": 4, "temperature": 0, **body}
    return json.dumps(
        {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": fields}
    )


def answers(path):
    return [json.loads(text) for text in path.read_text().splitlines()]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join([line("a"), "{broken", line("b", "world"), line("c", max_tokens=-1)]))
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"my only copy", "line 1 is no answer of a batch: give another output file"),
        (b'{"important": 1,\n "more": 2}', "line 1 is no answer of a batch"),
    ],
)
def test_a_file_of_the_user_is_refused_before_the_model_is_loaded(shell, source, content, message):
    target = source.with_name("out.jsonl")
    target.write_bytes(content)
    assert message in shell.fails("run-batch", source, target, "--model", "no-such-model")
    assert target.read_bytes() == content


def test_the_batch_itself_is_no_output(shell, source, monkeypatch):
    text = source.read_bytes()
    monkeypatch.chdir(source.parent)
    os.link(source, "link.jsonl")
    for target in (source, "in.jsonl", "link.jsonl"):
        failed = shell.fails("run-batch", source, target, "--model", "no-such-model")
        assert "is the batch file itself" in failed
    assert source.read_bytes() == text


def test_every_line_is_answered_once(shell, source, small_dir):
    target = source.with_name("out.jsonl")
    command = ["run-batch", source, target, "--model", small_dir, "--device", "cpu"]
    command += ["--max-num-seqs", 4, "--kv-cache-memory", 0.01]
    done = shell(*command)
    assert done.status == 0, done.err
    assert "2 completed, 2 failed, 0 answered before" in done.out
    status = {a["custom_id"]: a["response"]["status_code"] for a in answers(target)}
    assert status == {"a": 200, "b": 200, "c": 400, None: 400}
    # Nothing is missing now, so no model is loaded.
    again = shell("run-batch", source, target, "--model", "no-such-model")
    assert again.status == 0, again.err
    assert "0 completed, 0 failed, 4 answered before" in again.out
    whole = target.read_bytes()
    for size in (len(whole) - 1, len(whole) - 30):
        target.write_bytes(whole[:size])
        assert shell(*command).status == 0
        ids = [a["custom_id"] for a in answers(target)]
        assert len(ids) == 4
        assert set(ids) == {"a", "b", "c", None}


@pytest.mark.slow
def test_a_killed_run_goes_on(shell, source, small_dir):
    target = source.with_name("out.jsonl")
    ids = [f"id-{i}" for i in range(12)]
    source.write_text("\n".join(line(i, max_tokens=40) for i in ids))
    command = ["run-batch", source, target, "--model", small_dir, "--device", "cpu"]
    command += ["--max-num-seqs", 1, "--kv-cache-memory", 0.01]
    killed = subprocess.Popen(
        [sys.executable, "-m", "quatom", *map(str, command)], stderr=subprocess.DEVNULL
    )
    while not target.exists() or target.read_bytes().count(b"\n") < 2:
        assert killed.poll() is None
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    first = target.read_bytes().splitlines()[:2]
    assert shell(*command).status == 0
    assert target.read_bytes().splitlines()[:2] == first
    assert sorted(a["custom_id"] for a in answers(target)) == sorted(ids)
