"""Second moments of a block whose weights are to reproduce the floating-point network's outputs."""

from torch import Tensor

from quatom.errors import RecipeError
from quatom.families.spec import SiteName
from quatom.modeling.block import DecoderBlock
from quatom.modeling.rotary import RotaryTables
from quatom.modeling.weights import FloatLayer
from quatom.quantize.lanes import Share
from quatom.quantize.measure import Moments
from quatom.quantize.statistics import (
    SecondMoments,
    TargetMoments,
    batch_slices,
    observe,
    run_batch,
)
from quatom.quantize.transforms.order import made_rows
from quatom.recipe import Recipe


def check_targets(recipe: Recipe) -> None:
    """Refuse targets that are no outputs of the rows as they are rounded, before any work.

    Raises:
        RecipeError: float_target is not 0, and the recipe scales rows or takes other ones.
    """
    if not recipe.float_target:
        return
    for own in recipe.variants:
        for needed, fits in (
            ("kv_cache.key_scaling 'none'", own.kv_cache.key_scaling == "none"),
            ("channel_scaling null", own.channel_scaling is None),
            ("channel_splitting null", own.channel_splitting is None),
        ):
            if not fits:
                raise RecipeError(
                    f"weights.rounder.float_target {recipe.float_target} compares outputs of each "
                    f"linear with those of the model as it comes, so it needs {needed}"
                )


def measure_targets(
    block: DecoderBlock,
    reference: DecoderBlock,
    arranged: FloatLayer,
    streams: tuple[Tensor, Tensor],  # float and quantized, each (sequences, length, hidden)
    rotary: RotaryTables,
    *,
    tf32: bool,
    share: Share,
) -> tuple[Moments, Moments]:
    """X^T X of the inputs X of every site, and Y^T X of target outputs Y; at the owners of sites.

    Args:
        block: floating-point weights, inputs as the quantized network will have them.
        reference: the floating-point block, whose outputs are the targets.
        arranged: the weights of `block`.
        streams: what enters `reference` and `block`.
        rotary: tables of the model.
        tf32: as in `SecondMoments`.
        share: the sequences of this process.
    """
    layer, (entering, hidden) = block.plan, streams
    orders = {name: held.order for name, held in arranged.sites.items() if held.order is not None}

    def measure(rows: slice, _: int) -> dict[str, Tensor]:
        moments, targets = SecondMoments(tf32=tf32), TargetMoments()
        for batch in batch_slices(hidden[rows]):
            outputs: dict[SiteName, Tensor] = {}
            inputs: dict[SiteName, Tensor] = {}
            with observe(reference, see_output=outputs.__setitem__):
                run_batch(reference, entering[rows][batch], rotary)
            with observe(block, inputs.__setitem__):
                run_batch(block, hidden[rows][batch], rotary)
            for site, x in inputs.items():
                output, bias = outputs[site], arranged.sites[site].bias
                if (made := made_rows(layer, site, orders)) is not None:
                    output = output[:, made]
                moments.add(site, x)
                targets.add(site, output if bias is None else output - bias, x)
        found = {f"{site}.moments": sums for site, sums in moments.sums.items()}
        return found | {f"{site}.targets": sums for site, sums in targets.sums.items()}

    sums = share.sum_up(measure, lambda name: share.owner(layer, name.split(".")[0]), hidden.device)
    moments = {n.removesuffix(".moments"): t for n, t in sums.items() if n.endswith(".moments")}
    targets = {n.removesuffix(".targets"): t for n, t in sums.items() if n.endswith(".targets")}
    return moments, targets
