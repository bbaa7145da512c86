"""What one tensor-parallel rank holds of a layer: plain slices of the stored tensors.

Linears of q, k, v, gate and up are cut along their rows. Those of o and down are cut along their
input channels, between the blocks that the recipe's `tensor_parallel` laid out. Each rank then
quantizes the channels that it holds, with scales of its own: a scale over all ranks would take a
maximum over them, one more synchronization in front of every o and down, and would be coarser.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from quatom.checkpoint.schema import TensorSpec, linear_tensors
from quatom.errors import CheckpointError, ModelError, RecipeError
from quatom.numerics.groups import GroupLayout
from quatom.plan import ROW_PARALLEL, LayerPlan, LinearPlan, SitePlan, input_spec
from quatom.recipe import Recipe


def check_degree(recipe: Recipe, degree: int) -> None:
    """Refuse a tensor-parallel degree that would cut a block of the checkpoint.

    Raises:
        RecipeError: it does not divide the recipe's `tensor_parallel`.
    """
    blocks = recipe.tensor_parallel
    if recipe.quantizes_weights and blocks % degree:
        raise RecipeError(
            f"tensor parallelism over {degree} ranks does not divide the checkpoint's "
            f"tensor_parallel {blocks}: run it on a number of ranks that divides {blocks}, or "
            f"quantize the model with --tensor-parallel {degree}"
        )


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of one stored linear that a rank holds: one partition of a fused linear's output."""

    linear: int
    """Number of the stored linear in its site."""
    start: int
    """First stored row."""
    rows: int


@dataclass(frozen=True, slots=True)
class Share:
    """The part of a site that a rank computes."""

    stored: SitePlan
    """The site as the checkpoint holds it."""
    layer: LayerPlan
    """The rank's own layer: what `quatom.checkpoint.codec.decode` reads the slices with."""
    pieces: tuple[Piece, ...]
    rank: int

    @property
    def site(self) -> SitePlan:
        """The rank's own site: one linear for each piece."""
        return self.layer.sites[self.stored.name]

    def tensors(self) -> dict[str, tuple[TensorSpec, ...]]:
        """By the last part of its name, what each piece has of every stored tensor but biases."""
        found: dict[str, list[TensorSpec]] = {}
        for linear in self.site.linears:
            for name, spec in linear_tensors(self.site, linear).items():
                suffix = name.removeprefix(f"{linear.name}.")
                if suffix != "bias":
                    found.setdefault(suffix, []).append(spec)
        return {suffix: tuple(specs) for suffix, specs in found.items()}

    def slices(self, suffix: str, stored: Tensor, linear: int) -> dict[int, Tensor]:
        """The pieces of a stored tensor of linear number `linear`, by their number.

        Raises:
            CheckpointError: an order leaves the rank's own channels.
        """
        specs = self.tensors()[suffix]
        found = {}
        for number, piece in enumerate(self.pieces):
            if piece.linear != linear:
                continue
            shape = specs[number].shape
            part = stored
            if suffix != "order":
                part = part.narrow(0, piece.start * shape[0] // piece.rows, shape[0])
            if part.shape[-1] != shape[-1]:
                part = part.narrow(-1, self.rank * shape[-1], shape[-1])
            if suffix == "order":
                part = self._rebased(part)
            found[number] = part
        return found

    def _rebased(self, order: Tensor) -> Tensor:
        """A slice of a block-diagonal order, counted from the rank's first channel."""
        channels = self.site.channels
        own = order - self.rank * channels if channels != self.stored.channels else order
        if own.min() < 0 or own.max() >= channels:
            raise CheckpointError(
                f"{self.stored.title}: the order of rank {self.rank}'s {channels} channels names "
                "channels of other ranks; the checkpoint is damaged: quantize again"
            )
        return own


def share_of(
    layer: LayerPlan,
    site: SitePlan,
    recipe: Recipe,
    *,
    partitions: Sequence[int],
    rank: int,
    degree: int,
) -> Share:
    """The share of `rank` in a site.

    Args:
        layer: the layer as stored.
        site: one of its sites.
        recipe: the checkpoint's.
        partitions: rows that the rank holds of each part of the fused linear: q, k and v; gate and
            up.
        rank: from 0.
        degree: number of ranks.

    Raises:
        RecipeError: the degree does not divide the recipe's, or a scale of several rows is cut.
        ModelError: the partitions are no parts of the site.
    """
    check_degree(recipe, degree)
    pieces = []
    for (linear, first, whole), rows in zip(
        _parts(layer, site, partitions), partitions, strict=True
    ):
        shards = whole // rows  # fewer than ranks where several hold the same heads of k and v
        if whole % rows or degree % shards:
            raise ModelError(
                f"{site.title}: a rank of {degree} holds {rows} rows of a part of {whole}; "
                "expected equal shares"
            )
        if rows % recipe.weights.rows_per_scale:
            raise RecipeError(
                f"{site.title}: a rank of {degree} holds {rows} rows, no multiple of "
                f"weights.rows_per_scale {recipe.weights.rows_per_scale}: run it on fewer ranks"
            )
        pieces.append(Piece(linear, first + rank // (degree // shards) * rows, rows))
    sites = {name: _cut(other, degree) for name, other in layer.sites.items()}
    linears, first = [], 0
    for number, piece in enumerate(pieces):
        stored = site.linears[piece.linear]
        name, channels = f"{stored.name}:{number}", sites[site.name].channels
        linears.append(LinearPlan(name, first, piece.rows, channels, stored.bias))
        first += piece.rows
    sites[site.name] = replace(sites[site.name], linears=tuple(linears))
    return Share(site, replace(layer, sites=sites), tuple(pieces), rank)


def _parts(
    layer: LayerPlan, site: SitePlan, partitions: Sequence[int]
) -> list[tuple[int, int, int]]:
    """Stored linear, first row and rows of each part of a site's output, over all ranks."""
    if len(partitions) == len(site.linears):
        return [(number, 0, linear.rows) for number, linear in enumerate(site.linears)]
    if len(site.linears) == 1:  # fused in the files already
        attention, whole = layer.spec.attention, site.linears[0].rows
        sizes = [whole // len(partitions)] * len(partitions)
        if site.name == "qkv" and len(partitions) == 3:
            sizes = [attention.q_size, attention.kv_size, attention.kv_size]
        return [(0, sum(sizes[:number]), size) for number, size in enumerate(sizes)]
    raise ModelError(
        f"{site.title} is stored as {len(site.linears)} linears, vLLM's model has "
        f"{len(partitions)} parts"
    )


def _cut(site: SitePlan, degree: int) -> SitePlan:
    """A site with a rank's input channels; rows are not cut here."""
    if degree == 1 or site.name not in ROW_PARALLEL:
        return site
    whole = site.layout
    normal = whole.normal // degree
    layout = GroupLayout(
        normal=normal,
        group_size=min(whole.group_size, normal),
        outliers=whole.outliers // degree,
        outlier_blocks=whole.outlier_blocks // degree if whole.outliers else 1,
    )
    spec = input_spec(site.activations, site.outliers, layout)
    return replace(site, layout=layout, blocks=site.blocks // degree, input_spec=spec)


def joined_shapes(specs: Mapping[str, Sequence[TensorSpec]]) -> dict[str, TensorSpec]:
    """Specs of tensors that hold the pieces one below the other; orders in a row each."""
    joined = {}
    for suffix, parts in specs.items():
        shape = parts[0].shape
        rows = len(parts) if suffix == "order" else sum(part.shape[0] for part in parts)
        width = shape if suffix == "order" else shape[1:]
        joined[suffix] = TensorSpec((rows, *width), parts[0].dtype)
    return joined
