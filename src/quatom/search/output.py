"""What a search found, as a recipe file, as an entry of a result file, and in words."""

from fractions import Fraction
from typing import Any

from quatom.checkpoint.schema import bits_per_activation, bits_per_kv, bits_per_weight
from quatom.search.options import KINDS, averages, mean_bits
from quatom.search.run import Searched


def recipe_file(found: Searched) -> dict[str, Any]:
    """The recipe as `quatom quantize --recipe` reads it."""
    return {
        "base": found.base.recipe.name,
        "name": found.recipe.name,
        "overrides": found.recipe.to_dict()["overrides"],
    }


def search_entry(found: Searched, model: str, text: dict[str, Any]) -> dict[str, Any]:
    """One entry of a result file; the report draws its `curve`.

    Args:
        found: what was found.
        model: shown name of the model.
        text: what was measured on.
    """
    return {
        "model": model,
        "recipe": found.recipe.name,
        "base": found.base.recipe.name,
        "raised": list(found.kinds),
        "mean_bits": float(mean_bits(found.plan, found.kinds)),
        "base_mean_bits": float(mean_bits(found.base, found.kinds)),
        "bits_per_weight": bits_per_weight(found.plan),
        "bits_per_activation": bits_per_activation(found.plan),
        "bits_per_kv": bits_per_kv(found.plan),
        "base_divergence": sum(found.divergences),
        "expected_divergence": found.divergence,
        "block_divergences": list(found.divergences),
        "curve": [list(point) for point in found.curve],
        "overrides": found.recipe.to_dict()["overrides"],
        "options": [
            {
                "layer": place.layer,
                "place": place.name,
                "option": option.name,
                "bits": float(option.cost),
                "gain": gain,
                "chosen": number == chosen,
            }
            for place, own, chosen in zip(found.places, found.gains, found.chosen, strict=True)
            for number, (option, gain) in enumerate(zip(place.options, own, strict=True))
        ],
        "seconds": round(found.seconds, 1),
    } | text


def bits_rows(found: Searched) -> list[tuple[str, str, str]]:
    """Every average in words: its name, of the base, of what was found."""
    words = {"weights": "weight", "activations": "activation", "kv_cache": "KV value"}
    before, after = averages(found.base), averages(found.plan)
    values: dict[str, tuple[Fraction | float, Fraction | float]] = {
        **{f"bits per {words[kind]}": (before[kind], after[kind]) for kind in KINDS},
        f"mean of {', '.join(found.kinds)}": (
            mean_bits(found.base, found.kinds),
            mean_bits(found.plan, found.kinds),
        ),
        "expected KL divergence (nats)": (sum(found.divergences), found.divergence),
    }
    return [(name, f"{float(a):.4f}", f"{float(b):.4f}") for name, (a, b) in values.items()]
