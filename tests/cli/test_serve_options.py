"""`quatom serve`: options from a file, and what is refused before a model is loaded."""

import socket

import pytest

from quatom.serving.connections import url_of

TOML = """
model = "from-file"
max-num-seqs = 7
max_num_batched_tokens = 99
prefix-caching = false
api-key = ["a", "b"]
allowed-origins = "*"
gpu-memory = 1.5
port = 0
drain-seconds = 3
"""
YAML = """
model: from-file
max-num-seqs: 7
max_num_batched_tokens: 99
prefix-caching: no
api-key: [a, b]
allowed-origins: "*"
gpu-memory: 1.5
port: 0
drain-seconds: 3
"""


@pytest.fixture
def served(monkeypatch, serve_in_process):
    """What `quatom serve` was about to do: nothing is loaded or served."""
    calls = {}

    def start_engine(arguments, **options):
        calls.update(arguments)
        calls.update(options)
        return "engine"

    def serve_engine(engine, options, connections):
        calls["options"], calls["connections"] = options, connections
        calls["url"] = url_of(connections.listener, connections.tls)
        connections.listener.close()

    monkeypatch.setattr("quatom.serving.served_model.start_engine", start_engine)
    monkeypatch.setattr("quatom.serving.server.serve_engine", serve_engine)
    monkeypatch.delenv("QUATOM_API_KEY", raising=False)
    return calls


@pytest.mark.parametrize(("name", "text"), [("a.toml", TOML), ("a.yaml", YAML), ("a.yml", YAML)])
def test_a_file_of_options_and_the_command_line_over_it(served, shell, tmp_path, name, text):
    file = tmp_path / name
    file.write_text(text)
    done = shell("serve", "--config", file, "--max-num-seqs", 5, "--api-key", "c")
    assert (done.status, done.err) == (0, "")
    limits, options = served["limits"], served["options"]
    assert (served["model"], served["gpu_memory"]) == ("from-file", 1.5)
    assert (limits["max_num_seqs"], limits["max_num_batched_tokens"]) == (5, 99)
    assert limits["prefix_caching"] is False
    assert (served["own_process"], served["restart"]) == (True, False)
    assert options.api_keys == ("c",)
    assert options.allowed_origins == ("*",)
    assert served["connections"].drain_seconds == 3
    assert shell("serve", "other", "--config", file).status == 0
    assert served["model"] == "other"
    assert served["options"].api_keys == ("a", "b")


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("a.yaml", "max-num-seq: 4", ["'max-num-seq' is no option", "did you mean max-num-seqs?"]),
        ("a.yaml", "config: b.yaml", ["'config' is no option"]),
        ("a.yaml", "help: true", ["'help' is no option"]),
        ("a.yaml", "no-prefix-caching: true", ["'no-prefix-caching'", "mean prefix-caching?"]),
        ("a.toml", "max-num-seqs = 4\nmax_num_seqs = 5", ["'max_num_seqs' is given twice"]),
        ("a.yaml", "port: 1\nport: 2", ["a.yaml cannot be parsed", "'port' is given twice"]),
        ("a.yaml", "port:", ["port has no value"]),
        ("a.yaml", "port: [1, 2]", ["port has a list"]),
        ("a.yaml", "api-key: {a: b}", ["api-key has a dict"]),
        ("a.yaml", "- port", ["must hold option names and values"]),
        ("a.yaml", "port: [", ["a.yaml cannot be parsed"]),
        ("a.toml", "port = ", ["a.toml cannot be parsed"]),
        ("a.json", "{}", [".yaml, .yml or .toml"]),
        ("missing.yaml", None, ["cannot read", "missing.yaml", "No such file"]),
    ],
)
def test_files_that_are_no_options(served, shell, tmp_path, name, text, parts):
    file = tmp_path / name
    if text is not None:
        file.write_text(text)
    done = shell("serve", "model", "--config", file)
    assert done.status == 1
    assert done.err.startswith("quatom: ")
    assert len(done.err.splitlines()) == 1
    assert all(part in done.err for part in parts), done.err
    assert not served


@pytest.mark.parametrize("text", ["port: 2.5", "port: x", "port: 70000", "prefix-caching: 7"])
def test_a_value_in_a_file_is_checked_like_one_on_the_command_line(served, shell, tmp_path, text):
    file = tmp_path / "a.yaml"
    file.write_text(text)
    assert shell("serve", "model", "--config", file).status == 2
    assert not served


def test_what_is_wrong_without_a_model_is_said_without_loading_one(served, shell, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for options, part in [
            (("--port", port), f"port {port}: Address already in use"),
            (("--host", "192.0.2.7"), "cannot listen on 192.0.2.7"),
            (("--ssl-certfile", tmp_path / "no.pem"), "belong together"),
            (("--ssl-certfile", tmp_path / "no", "--ssl-keyfile", tmp_path / "k"), "cannot read"),
            (("--hang-seconds", 1.5), "--hang-seconds 1.5 is neither 0 (never) nor 2 or more"),
            (("--hang-seconds", "nan"), "--hang-seconds nan is neither"),
            (("--served-model-name", ""), "--served-model-name is empty: give a name"),
            (("--api-key", ""), "API key 1 of 1 is empty"),
            (("--api-key-file", tmp_path / "none"), "cannot read the API keys"),
            (("--allowed-origins", "example.org"), "'example.org' is no origin"),
            (("--log-level", "LOUD"), "--log-level must be one of DEBUG"),
            (("--max-num-seqs", 9, "--max-num-batched-tokens", 8), "below max_num_seqs"),
            (("--dtype", "int3"), "dtype must be one of"),
            (("--random-weights", "llama-2-7b"), "give either MODEL or --random-weights"),
            (("--no-engine-process", "--restart-engine"), "--restart-engine needs"),
        ]:
            done = shell("serve", "model", *options)
            assert (done.status, part in done.err) == (1, True), (options, done.err)
            assert not served


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("model", "--recipe", "quatom-w4a8kv4"), "--recipe is for --random-weights: model has"),
        (("--random-weights", "absent"), "unknown model shape 'absent'; known are"),
        (("--random-weights", "tiny", "--recipe", "w1a1"), "unknown recipe 'w1a1'"),
    ],
)
def test_random_weights_that_cannot_be_made(served, shell, options, part):
    done = shell("serve", *options)
    assert (done.status, part in done.err) == (1, True), done.err
    assert not served
