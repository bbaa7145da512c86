"""Linears of a floating-point model, by one name whatever form its files have.

Files hold one tensor per expert and projection, or all experts in one tensor, whose rows and
columns may be in another order; those of GPT-2 hold transposed weights, those of StableLM norms
of q and k with one tensor per head. A family lists the
spellings (`quatom.families.spec.Spelling`).
What is joined here is read from its parts one after the other, into memory of the whole. What is
one tensor already is put in order in its own memory, one expert after another.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from quatom.checkpoint.schema import TensorSpec
from quatom.errors import CheckpointError
from quatom.families.spec import Layer, ModelConfig, SiteName, Spelling
from quatom.plan import LayerPlan, LinearPlan, ModelPlan

Read = Callable[[str], Tensor]


@dataclass(frozen=True, slots=True)
class JoinedTensor:
    """A tensor that lies in files in another form."""

    parts: tuple[tuple[str, ...], ...]
    """Tensors of every expert, whose rows follow one another, or of every head; one entry alone:
    the whole tensor under another name."""
    spec: TensorSpec
    spelling: Spelling
    """How the rows and columns of a whole tensor are."""

    def read(self, read: Read) -> Tensor:
        """The tensor, its parts read with `read`."""
        if self.spelling.whole:
            return self._in_order(read(self.parts[0][0]))
        whole = torch.empty(self.spec.shape, dtype=self.spec.dtype)
        for expert, names in zip(whole, self.parts, strict=True):
            first = 0
            for name in names:
                part = read(name)
                expert[first : first + len(part)] = part
                first += len(part)
        return whole

    def _in_order(self, stored: Tensor) -> Tensor:
        """A tensor with its rows in order; one of all experts is moved within its memory."""
        spelling = self.spelling
        if not (spelling.transposed or spelling.interleaved):
            return stored.view(self.spec.shape)
        if spelling.transposed and stored.ndim == 2:
            return stored.t().contiguous()
        whole = stored.view(self.spec.shape)
        for own, into in zip(stored, whole, strict=True):
            rows = own.t() if spelling.transposed else own
            parts = (rows[::2], rows[1::2]) if spelling.interleaved else (rows,)
            into.copy_(torch.cat([part.clone() for part in parts]))
        return whole

    @property
    def names(self) -> list[str]:
        """All its parts."""
        return [name for names in self.parts for name in names]


def join_experts(
    where: Path, resolved: ModelPlan, stored: Mapping[str, TensorSpec]
) -> tuple[dict[str, TensorSpec], dict[str, JoinedTensor]]:
    """Stored tensors with those of experts under this library's names, and how these are read.

    Args:
        where: what an error names.
        resolved: what is opened; a Quatom checkpoint has one form.
        stored: tensors of the files, by name.

    Raises:
        CheckpointError: some tensors of a spelling are there and others are missing, or tensors
            that belong together differ in shape or dtype.
    """
    joined: dict[str, JoinedTensor] = {}
    if resolved.recipe.quantizes_weights:
        return dict(stored), joined
    used: set[str] = set()
    for layer in resolved.layers:
        transposed = _are_transposed(resolved.config, layer, stored)
        for name, spellings in _spellings(layer.spec, len(stored)):
            own = layer.prefix + name
            if own in stored:
                continue
            for spelling, within in spellings:
                others = [other for other, _ in spellings if other.names == spelling.names]
                if len(others) > 1 and spelling.transposed != transposed:
                    continue
                parts = tuple(tuple(layer.prefix + n for n in names) for names in within)
                names = [n for expert in parts for n in expert]
                missing = [n for n in names if n not in stored]
                if len(missing) == len(names):
                    continue
                if missing:
                    raise CheckpointError(
                        f"{where} lacks {missing[0]} ({len(missing)} of {len(names)} such tensors "
                        "are missing); download the model again"
                    )
                spec = _joined_spec(where, spelling, parts, stored)
                if spelling.transposed and len(spec.shape) >= 2:
                    *count, columns, rows = spec.shape
                    spec = replace(spec, shape=(*count, rows, columns))
                if spelling.row and spec.shape[:-1] == (1,):
                    spec = replace(spec, shape=spec.shape[1:])
                joined[own] = JoinedTensor(parts, spec, spelling)
                used.update(names)
                break
    rest = {name: spec for name, spec in stored.items() if name not in used}
    return rest | {name: tensor.spec for name, tensor in joined.items()}, joined


def _are_transposed(
    config: ModelConfig, layer: LayerPlan, stored: Mapping[str, TensorSpec]
) -> bool:
    """Whether whole tensors of experts are (E, input channels, rows), where they may be either.

    Their shapes tell, all but those of square matrices. Of gate_up, whose rows are twice the
    channels of down, and of down at most one is square.
    """
    sites: tuple[SiteName, ...] = ("experts_gate_up", "experts_down")
    for site in sites:
        for linear in layer.spec.linears.get(site, ()):
            columns = config.input_channels(layer.spec, site)
            for spelling in linear.spellings:
                spec = stored.get(layer.prefix + spelling.names[0])
                if spelling.transposed and spec is not None and linear.rows != columns:
                    return spec.shape[1:] == (columns, linear.rows)
    return False


Parts = tuple[tuple[str, ...], ...]
"""Names of the parts of every expert, or of every head."""


def _spellings(layer: Layer, most: int) -> Iterator[tuple[str, list[tuple[Spelling, Parts]]]]:
    """Names within a layer, and other spellings of each of at most `most` tensors."""
    for site in layer.sites:
        for linear in layer.linears[site]:
            # A damaged number of experts must not fill the memory with names.
            few = linear.experts is None or linear.experts <= most
            for end, spellings in ("weight", linear.spellings), ("bias", linear.bias_spellings):
                found = [(s, _parts(s.names, linear.experts)) for s in spellings] if few else []
                yield f"{linear.name}.{end}", found
    if layer.qk_norm_parts is not None:
        heads = layer.attention.num_heads, layer.attention.num_kv_heads
        for own, part, count in zip(layer.qk_norm_names, layer.qk_norm_parts, heads, strict=True):
            if count <= most:
                spelling = Spelling((f"{part}.weight",))
                yield f"{own}.weight", [(spelling, _parts(spelling.names, count))]
    if layer.experts is not None:
        for tensor, (own, *others) in layer.experts.tensors.items():
            row = tensor == "correction"
            yield own, [(Spelling((other,), row=row), ((other,),)) for other in others]


def other_parts(layer: LayerPlan, linear: LinearPlan) -> list[Parts]:
    """Prefixes of the tensors of each expert, or of a linear, in every spelling of it as it is."""
    linears = (one for site in layer.spec.sites for one in layer.spec.linears[site])
    own = next(one for one in linears if layer.prefix + one.name == linear.name)
    return [
        tuple(
            tuple(layer.prefix + name.removesuffix(".weight") for name in names)
            for names in _parts(spelling.names, own.experts)
        )
        for spelling in own.spellings
        if not (spelling.transposed or spelling.interleaved)
    ]


def _parts(names: tuple[str, ...], count: int | None) -> Parts:
    if any("{}" in name for name in names):
        assert count is not None
        return tuple(tuple(name.format(number) for name in names) for number in range(count))
    return (names,)


def _joined_spec(
    where: Path, spelling: Spelling, parts: Parts, stored: Mapping[str, TensorSpec]
) -> TensorSpec:
    specs = [[stored[name] for name in names] for names in parts]
    if spelling.whole:
        return specs[0][0]
    for names, own in zip(parts, specs, strict=True):
        for name, spec, first_name, like in zip(names, own, parts[0], specs[0], strict=True):
            if (spec.shape, spec.dtype) != (like.shape, like.dtype) or not spec.shape:
                raise CheckpointError(
                    f"{where}: {name} is {spec.shape} {spec.dtype}, {first_name} is "
                    f"{like.shape} {like.dtype}: all must be equal; download the model again"
                )
    first = specs[0]
    if any((spec.shape[1:], spec.dtype) != (first[0].shape[1:], first[0].dtype) for spec in first):
        raise CheckpointError(
            f"{where}: {' and '.join(parts[0])} differ in input channels or dtype; download the "
            "model again"
        )
    rows = sum(spec.shape[0] for spec in first)
    return TensorSpec((len(parts), rows, *first[0].shape[1:]), first[0].dtype)
