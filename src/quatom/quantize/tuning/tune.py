"""Tuning of one layer, as its recipe says."""

from quatom.errors import RecipeError
from quatom.modeling.weights import FloatLayer, LayerWeights, SiteCodes
from quatom.plan import LayerPlan, ModelPlan
from quatom.quantize.ranks import Ranks
from quatom.quantize.tuning.block import build_tuned_block
from quatom.quantize.tuning.codes import LearnedCodes
from quatom.quantize.tuning.descent import Learning, Outcome, Text, learn
from quatom.quantize.tuning.low_rank import LearnedCorrections
from quatom.quantize.tuning.nearest import check_nearest
from quatom.quantize.tuning.omniquant import LearnedTransforms
from quatom.recipe import Recipe
from quatom.recipe_tuning import LowRankSpec, OmniQuantSpec, TuningSpec


def check_tuning(resolved: ModelPlan, ranks: Ranks) -> None:
    """Refuse what cannot be tuned, before any work.

    Raises:
        RecipeError: several processes quantize, the model has routed experts, or the method does
            not go with the recipe.
    """
    tuning = resolved.recipe.tuning
    if tuning is None:
        return
    if ranks.count > 1:
        raise RecipeError(
            f"recipe {resolved.recipe.name!r} tunes, which runs in one process, and there are "
            f"{ranks.count}: start quantize without torchrun"
        )
    if any(layer.spec.experts is not None for layer in resolved.layers):
        raise RecipeError(
            f"recipe {resolved.recipe.name!r} tunes blocks by gradients, which do not pass through "
            "routed experts: use a recipe without tuning for mixtures of experts"
        )
    for recipe in resolved.recipe.variants:
        _check_recipe(recipe)
        if not isinstance(tuning, TuningSpec):
            check_nearest(recipe, tuning)


def _check_recipe(recipe: Recipe) -> None:
    formats = [recipe.weights.format]
    if recipe.outliers.channels:
        formats.append(recipe.outliers.format)
    strange = [name for name in formats if not name.startswith("int")]
    if strange or recipe.incoherence is not None:
        raise RecipeError(
            f"tuning moves integer codes of weights as they are: it needs formats int2 to int8 "
            f"of weights and outliers, and incoherence null, got {', '.join(formats)} and "
            f"{recipe.incoherence}"
        )


def begin(
    layer: LayerPlan,
    floats: FloatLayer,
    rounded: LayerWeights,
    spec: TuningSpec | OmniQuantSpec | LowRankSpec,
    seed: int,
) -> LearnedCodes | LearnedTransforms | LearnedCorrections:
    """What a method learns of a layer, as it is before the first step; arguments as of `tune`."""
    if isinstance(spec, OmniQuantSpec):
        return LearnedTransforms(layer, floats, spec)
    if isinstance(spec, LowRankSpec):
        return LearnedCorrections(layer, floats, spec, seed)
    codes = {n: held for n, held in rounded.sites.items() if isinstance(held, SiteCodes)}
    return LearnedCodes(layer, floats, codes, spec)


def tune(
    layer: LayerPlan,
    floats: FloatLayer,
    rounded: LayerWeights,
    text: Text,
    spec: TuningSpec | OmniQuantSpec | LowRankSpec,
    seed: int,
) -> tuple[LayerWeights, Outcome]:
    """A rounded layer after tuning, no worse than before on the sequences kept out.

    Args:
        layer: what it computes.
        floats: the layer as it was rounded.
        rounded: its codes.
        text: what enters, and what should leave.
        spec: what is learned, how long and how fast.
        seed: chooses the sequences of each step, and where parameters begin that begin at random.
    """
    learned = begin(layer, floats, rounded, spec, seed)
    block = build_tuned_block(layer, floats)
    outcome = learn(block, learned, text, Learning(spec.steps, spec.sequences, seed))
    return learned.finish(rounded), outcome
