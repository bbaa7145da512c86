"""`quatom bench serve` against real servers: loads, latencies, failures, metrics."""

import json
import subprocess
import sys
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import accumulate
from threading import Lock, Thread

import httpx
import pytest

from quatom.benchmark.http_load import Target, run_load
from quatom.benchmark.serve import find_model, measure_serving
from quatom.benchmark.server_metrics import parse_metrics
from quatom.benchmark.server_process import serve_process
from quatom.benchmark.workloads import fixed_lengths
from quatom.errors import EngineError
from tests.benchmark.test_throughput import FORM
from tests.serving.conftest import make_engine, running_server

PROMPTS = [[i + 1] * 9 for i in range(6)]


@pytest.fixture(scope="module")
def server():
    with running_server(make_engine(max_num_seqs=4)) as running:
        yield running


def load(target, counts, **options):
    return run_load(target, PROMPTS[: len(counts)], counts, poll_seconds=0.01, **options)


def test_closed_loop(server):
    run = load(Target(server.url, "hash"), [5, 9, 1, 20, 7, 6], concurrency=2)
    assert run.errors == []
    assert [r.output_tokens for r in run.requests] == [5, 9, 1, 20, 7, 6]
    assert len(run.intervals) == 48 - 6
    assert run.timeline.max_running <= 2
    for r in run.requests:
        assert 0 <= r.arrival < r.first_token <= r.last_token <= run.seconds
    # Never more than two at once: the third begins when one of the first two has ended.
    ends = sorted(r.last_token for r in run.requests[:2])
    assert run.requests[2].arrival >= ends[0]
    assert run.kv_tokens == 4000 * 16
    assert run.preemptions == 0


def test_open_loop_sends_on_time_and_counts_from_then(server):
    arrivals = [0.0, 0.1, 0.1, 0.3]
    run = load(Target(server.url, "hash"), [4] * 4, arrivals=arrivals)
    assert run.errors == []
    assert [r.arrival for r in run.requests] == arrivals
    assert all(r.first_token > r.arrival for r in run.requests)
    assert run.seconds >= 0.3


def test_an_entry(server):
    entry = measure_serving(
        Target(server.url, find_model(server.url, None)),
        fixed_lengths(5, 12, 6),
        model="hash",
        recipe="none",
        request_rate=50.0,
    )
    assert entry.keys() >= FORM
    assert (entry["mode"], entry["request_rate"], entry["concurrency"]) == ("serve", 50.0, None)
    assert entry["output_tokens_per_s"] == pytest.approx(30 / entry["seconds"], rel=0.01)
    assert entry["total_tokens_per_s"] == pytest.approx(90 / entry["seconds"], rel=0.01)
    assert entry["errors"] == 0
    assert entry["kv_tokens"] == 64000
    assert entry["client_processes"] >= 1
    assert entry["client_cpu_us_per_token"] > 0
    assert all(entry[k]["p50"] > 0 for k in ("ttft_ms", "tpot_ms", "e2e_ms"))
    assert entry["itl_ms"]["p99"] > 0  # tokens that came in one read are 0 apart


def test_failures_are_counted_and_kept_out_of_latencies(server):
    target = Target(server.url, "hash")
    run = load(target, [5, 600, 5], concurrency=3)  # 600 tokens are above the model's limit
    assert len(run.errors) == 1
    assert run.requests[1].error.startswith("HTTP 400")
    with pytest.raises(EngineError, match="every request failed; the first one with: HTTP 404"):
        measure_serving(
            Target(server.url, "absent"),
            fixed_lengths(2, 4, 4),
            model="m",
            recipe="r",
            concurrency=1,
        )
    with pytest.raises(EngineError, match="either a concurrency or a request rate"):
        measure_serving(target, fixed_lengths(2, 4, 4), model="m", recipe="r")
    with pytest.raises(EngineError, match="gave no model"):
        find_model("http://127.0.0.1:9", None)


@contextmanager
def serving(handler):
    """The URL of a server with this handler."""
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    httpd.daemon_threads = True
    thread = Thread(target=httpd.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}"
    finally:
        httpd.shutdown()
        thread.join()
        httpd.server_close()


@contextmanager
def scripted_server(events, *, delay=0.0):
    """Streams the same events to every request and has no metrics."""
    most = {"now": 0, "most": 0}
    lock = Lock()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            self.send_error(404)

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            with lock:
                most["now"] += 1
                most["most"] = max(most["most"], most["now"])
            self.send_response(200)
            self.end_headers()
            for event in events:
                time.sleep(delay)
                self.wfile.write(event)
                self.wfile.flush()
            with lock:
                most["now"] -= 1

    with serving(Handler) as url:
        yield url, most


def chunk(**choice):
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


def test_times_are_the_clients_own():
    events = [chunk(token_ids=[1]), chunk(token_ids=[2, 3]), chunk(token_ids=[]), b"data: [DONE]"]
    with scripted_server(events, delay=0.1) as (url, most):
        run = load(Target(url, "m"), [3, 3, 3, 3], concurrency=4)
    assert run.errors == []
    assert most["most"] == 4
    assert (run.kv_tokens, run.timeline.samples) == (None, [])
    for r in run.requests:
        assert 0.1 <= r.first_token - r.arrival < 0.19
        assert 0.09 <= r.last_token - r.first_token < 0.19
    # Two tokens in one event: one waited for the event, the other came with it.
    assert sorted(run.intervals)[:4] == [0.0] * 4
    assert all(0.09 <= gap < 0.19 for gap in sorted(run.intervals)[4:])


def test_events_may_be_cut_anywhere():
    whole = chunk(text="a") + chunk(text="b") + b"data: [DONE]\n\n"
    pieces = [whole[i : i + 7] for i in range(0, len(whole), 7)]
    with scripted_server(pieces, delay=0.002) as (url, _):
        run = load(Target(url, "m"), [2, 2], concurrency=1)
    assert run.errors == []
    assert [r.output_tokens for r in run.requests] == [2, 2]


@pytest.fixture(scope="module")
def fast_server():
    """The URL of a server that is never what a measurement waits for."""
    command = [sys.executable, "-m", "tests.benchmark.fast_server", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("processes", [1, 3])
def test_processes_share_users_and_requests(fast_server, processes):
    counts = [1 + i % 7 for i in range(50)]
    prompts = [[1]] * len(counts)
    run = run_load(Target(fast_server, "m"), prompts, counts, concurrency=7, processes=processes)
    assert run.errors == []
    assert run.processes == processes
    assert [r.output_tokens for r in run.requests] == counts
    assert len(run.intervals) == sum(counts) - len(counts)
    # A sweep line over begin and end: never more requests at once than users.
    times = [(r.arrival, 1) for r in run.requests] + [(r.last_token, -1) for r in run.requests]
    assert max(accumulate(change for _, change in sorted(times))) <= 7


def test_more_processes_than_users_are_not_started(fast_server):
    run = run_load(Target(fast_server, "m"), [[1]] * 3, [2] * 3, concurrency=2, processes=8)
    assert (run.processes, run.errors) == (2, [])
    run = run_load(Target(fast_server, "m"), [[1]] * 3, [2] * 3, arrivals=[0, 0, 0], processes=8)
    assert (run.processes, run.errors) == (3, [])


def test_a_token_costs_the_client_little(fast_server):
    """An HTTP client library with a JSON parser needs several times the CPU for the same stream."""
    tokens = 2000
    run = run_load(Target(fast_server, "m"), [[1]] * 4, [tokens] * 4, concurrency=4, processes=1)
    assert run.errors == []
    before, count = time.process_time(), 0
    body = {"max_tokens": tokens, "prompt": [1]}
    with httpx.stream("POST", f"{fast_server}/v1/completions", json=body) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                choices = json.loads(line[6:])["choices"]
                count += sum(len(choice["token_ids"]) for choice in choices)
    assert count == tokens
    library = (time.process_time() - before) / tokens
    # Measured: 4 to 6 times. A factor of 2 leaves room for a busy machine.
    assert run.cpu_seconds / (4 * tokens) < library / 2


def test_an_error_of_a_known_length_ends_there():
    """Some servers keep a connection open although they were asked to close it."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(503)
            self.send_header("Content-Length", "4")
            self.end_headers()
            self.wfile.write(b"full")
            self.close_connection = False

        def do_GET(self):
            self.send_error(404)

    with serving(Handler) as url:
        run = load(Target(url, "m"), [2, 2], concurrency=1)
    assert run.errors == ["HTTP 503: full"] * 2


@pytest.mark.parametrize(
    ("events", "error"),
    [
        ([chunk(text="a"), b"data: [DONE]\n\n"], "ended after 1 of 2 tokens"),
        ([b'data: {"error":{"message":"broken"}}\n\n'], "{'message': 'broken'}"),
    ],
)
def test_short_and_broken_streams_are_errors(events, error):
    with scripted_server(events) as (url, _):
        run = load(Target(url, "m"), [2], concurrency=1)
    assert run.errors == [error]


def test_metrics_of_vllm():
    text = (
        "# HELP vllm:num_requests_running Number\n"
        'vllm:num_requests_running{engine="0",model_name="m"} 7.0\n'
        'vllm:kv_cache_usage_perc{engine="0",model_name="m"} 1.5e-01\n'
        'vllm:cache_config_info{block_size="16",cache_dtype="auto",num_gpu_blocks="100"} 1.0\n'
    )
    values = parse_metrics(text)
    assert values["num_requests_running"] == 7.0
    assert values["kv_cache_usage_perc"] == 0.15
    assert values["kv_tokens"] == 1600
    assert parse_metrics("nothing") == {}


def test_a_server_that_cannot_start_is_reported(capfd):
    with (
        pytest.raises(EngineError, match="ended with status 1 before it answered"),
        serve_process(["--random-weights", "absent"]),
    ):
        pass
    assert "unknown model shape 'absent'" in capfd.readouterr().err
