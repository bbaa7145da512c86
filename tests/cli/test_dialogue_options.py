"""--chat-template, --tool-format and --reasoning-format: checked first, then used."""

import json

import pytest


@pytest.fixture
def template(tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}"
    )
    return path


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--tool-format", "xml", "no tool format is named 'xml'; there are harmony"),
        ("--reasoning-format", "loud", "no reasoning format is named 'loud'; there are auto"),
        ("--chat-template", "no/such/file", "cannot read the chat template no/such/file"),
    ],
)
def test_bad_options_are_found_before_the_model_is_loaded(shell, tmp_path, option, value, message):
    assert message in shell.fails("serve", "no-such-model", option, value)
    source = tmp_path / "in.jsonl"
    source.write_text("")
    command = ("run-batch", source, tmp_path / "out", "--model", "no-such-model")
    assert message in shell.fails(*command, option, value)


def test_a_broken_template_is_found_before_the_model_is_loaded(shell, template):
    template.write_text("{% if %}")
    failed = shell.fails("serve", "no-such-model", "--chat-template", template)
    assert "is no chat template: Expected an expression" in failed


def test_a_batch_uses_them_on_every_route(shell, tmp_path, template, small_dir):
    tool = {"name": "now", "parameters": {"type": "object", "properties": {}}}
    chat = {
        "messages": [{"role": "user", "content": "hi"}],
        "tools": [{"type": "function", "function": tool}],
        "tool_choice": "required",
        "max_tokens": 80,
        "parallel_tool_calls": False,
    }
    bodies = {
        "/v1/chat/completions": chat,
        "/v1/responses": {
            "input": "hi",
            "tools": [{"type": "function", **tool}],
            "tool_choice": "required",
            "max_output_tokens": 80,
            "parallel_tool_calls": False,
        },
        "/v1/embeddings": {"input": "hi"},
    }
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(
        "\n".join(
            json.dumps({"custom_id": url, "method": "POST", "url": url, "body": body})
            for url, body in bodies.items()
        )
    )
    options = ["--chat-template", template, "--tool-format", "hermes", "--device", "cpu"]
    options += ["--max-num-seqs", 4, "--kv-cache-memory", 0.01]
    done = shell("run-batch", source, target, "--model", small_dir, *options)
    assert done.status == 0, done.err
    made = {}
    for line in target.read_text().splitlines():
        answer = json.loads(line)
        assert answer["response"]["status_code"] == 200, answer
        made[answer["custom_id"]] = answer["response"]["body"]
    message = made["/v1/chat/completions"]["choices"][0]["message"]
    assert message["tool_calls"][0]["function"]["name"] == "now"
    assert made["/v1/responses"]["output"][0]["name"] == "now"
    assert len(made["/v1/embeddings"]["data"][0]["embedding"]) == 128
