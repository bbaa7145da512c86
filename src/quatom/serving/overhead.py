"""What a token costs a server besides the model: CPU time by process, over HTTP with streaming.

The model is stubbed as in `quatom.benchmark.engine_overhead`; scheduling, sampling, detokenizing,
events and sockets are real. Run as

    python -m quatom.serving.overhead --output benchmarks/results/serving-overhead-cpu.json
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quatom.benchmark.engine_overhead import read_tokenizer, stub_engine
from quatom.benchmark.environment import command_line, describe_environment, write_results
from quatom.benchmark.http_load import Target, run_load
from quatom.engine.child_process import start_module
from quatom.engine.engine import Engine
from quatom.serving.app import ServerOptions
from quatom.serving.async_engine import AsyncEngine
from quatom.serving.connections import open_listener
from quatom.serving.engine_launch import EnginePlan, EngineProcess
from quatom.serving.process_engine import ProcessEngine
from quatom.serving.server import Connections, serve_engine
from quatom.serving.thread_engine import ThreadEngine

PROMPT_TOKENS = 16
VOCABULARY = 256
PLACES = ("thread", "process")


def make_engine(num_seqs: int, length: int, tokenizer: str | None) -> Engine:
    """The stubbed engine, in one process or the other."""
    return stub_engine(num_seqs, VOCABULARY, length, read_tokenizer(tokenizer))


def serve(place: str, num_seqs: int, length: int, tokenizer: str | None) -> None:
    """Serve the stubbed engine; the first line of output has the ports and processes."""
    arguments: dict[str, Any] = {"num_seqs": num_seqs, "length": length, "tokenizer": tokenizer}
    engine: AsyncEngine
    processes = [os.getpid()]
    if place == "thread":
        engine = ThreadEngine(make_engine(**arguments))
    else:
        plan = EnginePlan(factory="quatom.serving.overhead:make_engine", arguments=arguments)
        process = EngineProcess(plan)
        process.wait_until_ready()
        engine = ProcessEngine(process, read_tokenizer(tokenizer), plan=None)
        processes.append(process.popen.pid)
    listener = open_listener("127.0.0.1", 0)
    print(listener.getsockname()[1], *processes, flush=True)
    serve_engine(engine, ServerOptions(model_names=("stub",)), Connections(listener=listener))


def measure(place: str, *, num_seqs: int, tokens: int, tokenizer: str | None) -> dict[str, Any]:
    """Microseconds of CPU that each token takes in each process, and tokens per second."""
    length = PROMPT_TOKENS + tokens
    options = ["--serve", place, "--sequences", str(num_seqs), "--tokens", str(tokens)]
    options += [] if tokenizer is None else ["--tokenizer", tokenizer]
    server = start_module("quatom.serving.overhead", *options, stdout=subprocess.PIPE)
    try:
        assert server.stdout is not None
        port, *processes = map(int, server.stdout.readline().split())
        target = Target(f"http://127.0.0.1:{port}", "stub")
        prompts = [[i % VOCABULARY] * PROMPT_TOKENS for i in range(num_seqs)]
        run_load(target, prompts, [8] * num_seqs, concurrency=num_seqs)
        before = [cpu_seconds(pid) for pid in processes]
        run = run_load(target, prompts, [tokens] * num_seqs, concurrency=num_seqs)
        spent = [cpu_seconds(pid) - b for pid, b in zip(processes, before, strict=True)]
    finally:
        server.terminate()
        server.wait()
    assert not run.errors, run.errors[0]
    count = num_seqs * tokens
    server_us, *engine_us = (round(seconds / count * 1e6, 1) for seconds in spent)
    return {
        "mode": "serving_overhead",
        "engine": place,
        "sequences": num_seqs,
        "tokens": tokens,
        "length": length,
        "detokenized": tokenizer is not None,
        "output_tokens_per_s": round(count / run.seconds, 1),
        "server_us_per_token": server_us,
        "engine_us_per_token": engine_us[0] if engine_us else None,
        "client_us_per_token": round(run.cpu_seconds / count * 1e6, 1),
        "load_average": round(os.getloadavg()[0], 1),
    }


def cpu_seconds(pid: int) -> float:
    """CPU time of a process so far (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure both places and write a result file."""
    parser = argparse.ArgumentParser(description="CPU time of a served token without the model")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=500, help="of each sequence")
    parser.add_argument("--tokenizer", help="folder or GGUF of a model whose tokenizer is used")
    parser.add_argument("--output", type=Path, help="result file")
    parser.add_argument("--serve", choices=PLACES, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.serve is not None:
        serve(args.serve, args.sequences, PROMPT_TOKENS + args.tokens, args.tokenizer)
        return
    results = []
    for place in PLACES:
        result = measure(
            place, num_seqs=args.sequences, tokens=args.tokens, tokenizer=args.tokenizer
        )
        print(
            f"engine in a {place}: {result['output_tokens_per_s']:.0f} tokens/s, "
            f"{result['server_us_per_token']} us of the server per token, "
            f"{result['engine_us_per_token']} us of the engine",
            file=sys.stderr,
        )
        results.append(result)
    if args.output:
        command = command_line("python", "-m", "quatom.serving.overhead")
        write_results(args.output, command, describe_environment(), results)


if __name__ == "__main__":
    main()
