"""Compare every family with transformers, and every preset with the CPU, and write a result file.

Tiny random models of each family are made by transformers' own classes (tests/families/models.py).
docs/reference/families.md shows what was found. What the result file holds of models that are not
measured stays. Run from the root of the repository:

    python scripts/verify_families.py --device cuda --output benchmarks/results/families-h200.json
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.families.models import TINY, decode_context, save_tiny, tiny_model

from quatom.benchmark.environment import command_line, describe_environment, write_results
from quatom.errors import RecipeError
from quatom.loading import LoadedModel, load
from quatom.modeling.context import full_sequences_context
from quatom.presets import PRESETS
from quatom.quantize.pipeline import quantize_checkpoint
from quatom.recipe import CalibrationSpec

LENGTH = 72
"""Tokens of the text: longer than every window and than several KV blocks."""
BLOCK = 32
CALIBRATION = CalibrationSpec(num_samples=4, sequence_length=48)


@torch.inference_mode()
def prompt_logits(loaded: LoadedModel, tokens: Tensor) -> Tensor:  # (T,) -> (T, vocab) on the CPU
    """Logits of a whole prompt."""
    model = loaded.model
    model.limit_length(LENGTH)
    context = full_sequences_context(1, len(tokens), BLOCK, loaded.device)
    cache = model.allocate_kv_cache(-(-len(tokens) // BLOCK), BLOCK)
    return model.compute_logits(model(tokens.to(loaded.device), context, cache)).cpu()


@torch.inference_mode()
def decode_logits(loaded: LoadedModel, tokens: Tensor) -> Tensor:  # (T,) -> (T, vocab) on the CPU
    """Logits token by token through the paged cache."""
    model = loaded.model
    model.limit_length(LENGTH)
    cache = model.allocate_kv_cache(-(-len(tokens) // BLOCK), BLOCK)
    rows = [
        model.compute_logits(
            model(token[None], decode_context(position, BLOCK, loaded.device), cache)
        )
        for position, token in enumerate(tokens.to(loaded.device))
    ]
    return torch.cat(rows).cpu()


def distance(got: Tensor, want: Tensor) -> dict[str, float]:
    """Largest and root mean square difference, in units of the standard deviation of `want`."""
    difference = (got - want) / want.std()
    return {
        "largest": round(difference.abs().max().item(), 7),
        "rms": round(difference.square().mean().sqrt().item(), 7),
    }


def verify(
    name: str, presets: Sequence[str], device: str, folder: Path
) -> Iterator[dict[str, Any]]:
    """Results of one family: floating point, then every preset."""
    source = save_tiny(folder / name, name)
    tokens = torch.randint(0, 256, (LENGTH,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = tiny_model(name)(tokens[None]).logits[0]
    dtypes = (torch.float32,) if device == "cpu" else (torch.float32, torch.bfloat16)
    for dtype in dtypes:
        loaded = load(source, device=device, dtype=dtype)
        yield {
            "model": name,
            "family": loaded.config.family,
            "recipe": "fp16",
            "dtype": str(dtype).removeprefix("torch."),
            "against": "transformers, float32, CPU",
            "prompt": distance(prompt_logits(loaded, tokens), want),
            "decode": distance(decode_logits(loaded, tokens), want),
        }
    text = folder / "text.txt"
    text.write_text("".join(chr(97 + i * i % 26) + " " * (i % 5 == 0) for i in range(20_000)))
    for preset in presets:
        target = folder / f"{name}-{preset}"
        recipe = replace(PRESETS[preset], calibration=CALIBRATION)
        entry = {"model": name, "family": loaded.config.family, "recipe": preset}
        try:
            quantize_checkpoint(source, target, recipe, calibration=text, device="cpu")
        except RecipeError as error:
            yield entry | {"refused": str(error)}
            continue
        packed = load(target, device=device)
        reference = load(target, device="cpu")
        expected = prompt_logits(reference, tokens)
        yield entry | {
            "dtype": str(packed.dtype).removeprefix("torch."),
            "backend": packed.backend_name,
            "against": "the same checkpoint's prompt, float32, CPU",
            "prompt": distance(prompt_logits(packed, tokens), expected),
            "decode": distance(decode_logits(packed, tokens), expected),
        }


def verify_alone(name: str, presets: Sequence[str], device: str) -> list[dict[str, Any]]:
    """Results of one family, in files of its own."""
    with tempfile.TemporaryDirectory() as folder:
        return list(verify(name, presets, device, Path(folder)))


def results_of_others(path: Path, models: Sequence[str]) -> list[dict[str, Any]]:
    """What a result file holds of other models, with its origin."""
    if not path.exists():
        return []
    data = json.loads(path.read_text(encoding="utf-8"))
    origin = {"command": data["command"]}
    origin |= {key: data["environment"][key] for key in ("commit", "date")}
    return [origin | entry for entry in data["results"] if entry["model"] not in models]


def main(arguments: Sequence[str] | None = None) -> None:
    """Verify and write."""
    parser = argparse.ArgumentParser(description="families against transformers")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--models", nargs="+", default=list(TINY), choices=list(TINY))
    parser.add_argument("--presets", nargs="*", default=["atom-w4a4kv4", "quatom-w4a8kv4"])
    parser.add_argument("--jobs", type=int, default=1, help="processes, one family each")
    parser.add_argument("--output", type=Path, help="result file")
    args = parser.parse_args(arguments)
    results: list[dict[str, Any]] = []
    command, environment = command_line("python", "scripts/verify_families.py"), {}
    if args.output:
        environment = describe_environment()
        results = results_of_others(args.output, args.models)
    one = partial(verify_alone, presets=args.presets, device=args.device)
    # spawn: CUDA does not work in a forked process
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for entries in pool.map(one, args.models):
            for entry in entries:
                print(entry, flush=True)
            results += entries
            if args.output:  # after each model: an interrupted run keeps what it has
                write_results(args.output, command, environment, results)


if __name__ == "__main__":
    main()
