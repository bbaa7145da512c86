"""A recipe of your own, and a ladder of recipes that shows what each change is worth.

    python examples/custom_recipe.py MODEL CALIBRATION_TEXT EVALUATION_TEXT FOLDER

Each rung changes one more field of the recipe. The table shows bits and perplexity of every rung.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

import quatom


def ladder(samples: int, length: int) -> dict[str, quatom.Recipe]:
    """Recipes from plain INT4 to a custom one, each beside what it adds."""
    calibration = replace(quatom.Recipe().calibration, num_samples=samples, sequence_length=length)
    recipe = replace(quatom.Recipe(name="plain"), calibration=calibration)
    rungs = {"int4 weights and activations, GPTQ": recipe}
    recipe = replace(recipe, weights=replace(recipe.weights, clip_search="mse"))
    rungs["+ searched weight clipping"] = recipe
    recipe = replace(recipe, activations=replace(recipe.activations, rotation="hadamard"))
    rungs["+ rotated groups"] = recipe
    activations = replace(recipe.activations, format="int8", group_size=-1)
    recipe = replace(recipe, name="mine", activations=activations)
    rungs["+ 8-bit activations, one scale per token"] = recipe
    return rungs


def main() -> None:
    """Quantize with every rung and measure it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("calibration", type=Path)
    parser.add_argument("evaluation", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=32, help="calibration sequences")
    parser.add_argument("--length", type=int, default=512, help="tokens per sequence")
    parser.add_argument("--windows", type=int, default=8, help="evaluation windows")
    args = parser.parse_args()

    original = quatom.load(args.model)
    text = args.evaluation.read_text(encoding="utf-8")
    tokens = torch.tensor(original.require_tokenizer()(text, verbose=False)["input_ids"])

    def perplexity(loaded: quatom.LoadedModel) -> float:
        measured = quatom.measure_perplexity(
            loaded, tokens, sequence_length=args.length, max_windows=args.windows
        )
        return measured.perplexity

    print(f"{'float':<45} {'16':>5} bits  perplexity {perplexity(original):.2f}")
    for number, (what, recipe) in enumerate(ladder(args.samples, args.length).items()):
        report = quatom.quantize_checkpoint(
            args.model, args.folder / f"rung-{number}", recipe, calibration=args.calibration
        )
        measured = perplexity(quatom.load(report.target))
        print(f"{what:<45} {report.bits_per_weight:5.2f} bits  perplexity {measured:.2f}")


if __name__ == "__main__":
    main()
