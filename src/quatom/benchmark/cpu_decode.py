"""Decoding on a CPU: our engine on a packed checkpoint against transformers' generate in float32.

Both run in one process on the same prompts, in turns, so that what else the machine does hits both
alike; the ratio is that of the medians. The float model has the checkpoint's shape and random
weights, which take as long as any. Run as

    python -m quatom.benchmark.cpu_decode CHECKPOINT --output RESULT.json

Where the CPU multiplies int8 codes, weights are packed once when they are loaded; elsewhere they
are dequantized once (float32, as much memory as the float model). Activations and the KV cache are
quantized in every step.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from quatom.benchmark.environment import command_line, describe_environment, write_results
from quatom.engine.config import EngineConfig
from quatom.engine.engine import Engine
from quatom.engine.llm import LLM
from quatom.engine.sampling import SamplingParams
from quatom.loading import load


def measure(
    checkpoint: str, *, batch: int, new_tokens: int, prompt: int, rounds: int
) -> dict[str, Any]:
    """Tokens per second of both, decode and a short prompt together."""
    loaded = load(checkpoint, device="cpu")
    config = EngineConfig(
        max_num_seqs=batch,
        max_model_len=prompt + new_tokens + 1,
        prefix_caching=False,
        keep_freed_memory=True,
    )
    llm = LLM.from_engine(Engine(loaded, config))
    theirs = _transformers(checkpoint, new_tokens)
    generator = torch.Generator().manual_seed(0)
    tokens = (100, min(10_000, loaded.config.vocab_size))
    prompts = torch.randint(*tokens, (batch, prompt), generator=generator)
    params = SamplingParams(
        temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False
    )
    runs: dict[str, Callable[[], object]] = {
        "quatom": lambda: llm.generate(prompts.tolist(), params),
        "transformers": lambda: theirs(prompts),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if round_number:  # the first one warms up
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "mode": "cpu_decode",
        "model": Path(checkpoint).name,
        "recipe": loaded.recipe.name,
        "batch": batch,
        "input_tokens": prompt,
        "output_tokens": new_tokens,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "tokens_per_s": round(batch * new_tokens / medians["quatom"], 2),
        "transformers_tokens_per_s": round(batch * new_tokens / medians["transformers"], 2),
        "ratio": round(medians["transformers"] / medians["quatom"], 3),
    }


def _transformers(checkpoint: str, new_tokens: int) -> Callable[[torch.Tensor], object]:
    """The float model of the checkpoint's shape, from transformers' own class."""
    import transformers

    described = json.loads((Path(checkpoint) / "config.json").read_text(encoding="utf-8"))
    for ours in ("quantization_config", "attn_implementation"):
        described.pop(ours, None)
    config = transformers.AutoConfig.for_model(**described)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()

    def generate(prompts: torch.Tensor) -> object:
        with torch.inference_mode():
            return model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                do_sample=False,
            )

    return generate


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure each batch size and write a result file."""
    parser = argparse.ArgumentParser(description="decode on a CPU against transformers")
    parser.add_argument("checkpoint", help="packed checkpoint")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="result file")
    args = parser.parse_args(arguments)
    results = []
    for batch in args.batches:
        result = measure(
            args.checkpoint,
            batch=batch,
            new_tokens=args.new_tokens,
            prompt=args.prompt_tokens,
            rounds=args.rounds,
        )
        print(
            f"batch {batch}: {result['tokens_per_s']} tokens/s, transformers "
            f"{result['transformers_tokens_per_s']}, ratio {result['ratio']}",
            file=sys.stderr,
        )
        results.append(result)
    if args.output:
        command = command_line("python", "-m", "quatom.benchmark.cpu_decode")
        write_results(args.output, command, describe_environment(), results)


if __name__ == "__main__":
    main()
