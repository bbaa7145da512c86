"""Quantize a model, serve it, and talk to it with the openai client.

    python examples/quantize_and_serve.py MODEL TEXT TARGET

TEXT is the calibration text. The server runs in a process of its own and is stopped at the end.
"""

import argparse
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import replace

from openai import OpenAI

import quatom


def main() -> None:
    """Quantize, serve, ask one question with streaming."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("target")
    parser.add_argument("--samples", type=int, default=32, help="calibration sequences")
    parser.add_argument("--length", type=int, default=512, help="tokens per sequence")
    parser.add_argument("--question", default="What is the capital of France?")
    args = parser.parse_args()

    preset = quatom.PRESETS["quatom-w4a8kv4"]
    calibration = replace(preset.calibration, num_samples=args.samples, sequence_length=args.length)
    recipe = replace(preset, calibration=calibration)
    report = quatom.quantize_checkpoint(args.model, args.target, recipe, calibration=args.text)
    print(f"{report.target}: {report.bits_per_weight:.2f} bits per weight")

    port = free_port()
    command = [sys.executable, "-m", "quatom", "serve", args.target, "--port", str(port)]
    server = subprocess.Popen([*command, "--served-model-name", "assistant"])
    try:
        wait_for(server, f"http://127.0.0.1:{port}/health")
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        stream = client.chat.completions.create(
            model="assistant",
            messages=[{"role": "user", "content": args.question}],
            max_tokens=32,
            stream=True,
        )
        for chunk in stream:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        print()
    finally:
        server.terminate()
        server.wait()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for(server: "subprocess.Popen[bytes]", url: str, seconds: float = 600.0) -> None:
    """Return when `url` answers; stop when the server has ended."""
    deadline = time.monotonic() + seconds
    while server.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(url, timeout=5)
            return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
    sys.exit("the server did not start; its log above says why")


if __name__ == "__main__":
    main()
