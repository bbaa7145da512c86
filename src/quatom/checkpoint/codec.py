"""The weights of a site between two forms: rounded, as operations read them, and stored tensors.

`encode` and `decode` are each other's inverse. They know neither files nor models: what to do is in
the `SitePlan`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from quatom.errors import CheckpointError, ShapeError
from quatom.modeling.weights import LayerWeights, SiteCodes, matrices
from quatom.numerics.formats import Format, get_format
from quatom.numerics.multiples import pack_multiples, split_multiples, unpack_multiples
from quatom.numerics.packing import pack_bits, unpack_bits
from quatom.numerics.reorder import check_order, inverse_order, sliceable_positions
from quatom.plan import LayerPlan, SitePlan


def encode(layer: LayerPlan, site: SitePlan, codes: SiteCodes) -> dict[str, Tensor]:
    """The stored tensors of a site, by full name."""
    normal, outlier = get_format(site.weights.format), get_format(site.outliers.format)
    layout = site.layout
    values, scales, bias = codes.values, codes.scales, codes.bias
    if (rows := stored_rows(layer, site)) is not None:
        rows = rows.to(values.device)
        values, scales = values[..., rows, :], scales[..., rows, :]
        bias = None if bias is None else bias[..., rows]
    tensors: dict[str, Tensor] = {}
    for linear in site.linears:
        own = linear.row_range
        part, part_scales = values[..., own, :], scales[..., own, :]
        packed = [
            pack_bits(normal.encode(own[:, : layout.normal]), normal.bits) for own in matrices(part)
        ]
        tensors[f"{linear.name}.weight_packed"] = torch.stack(packed).view(
            *linear.lead, linear.rows, -1
        )
        normal_scales = part_scales[..., :: site.weights.rows_per_scale, : layout.num_normal_groups]
        for suffix, tensor in _encode_scales(site, normal_scales).items():
            tensors[f"{linear.name}.{suffix}"] = tensor
        if layout.outliers:
            kept = part[..., layout.normal :]
            if outlier.is_quantized:
                tensors[f"{linear.name}.outlier_weight"] = kept.to(torch.int8)
                tensors[f"{linear.name}.outlier_scale"] = part_scales[
                    ..., layout.num_normal_groups :
                ]
            else:
                tensors[f"{linear.name}.outlier_weight"] = kept.half()
        if site.order == "gathered":
            assert codes.order is not None
            order = codes.order.cpu()[_sliceable(site)]
            tensors[f"{linear.name}.order"] = order.int()
        if linear.bias:
            assert bias is not None
            tensors[f"{linear.name}.bias"] = bias[..., own]
    return tensors


def decode(layer: LayerPlan, site: SitePlan, tensors: Mapping[str, Tensor]) -> SiteCodes:
    """The weights of a site from its stored tensors.

    Raises:
        CheckpointError: linears that share the input carry different orders, or no order at all.
    """
    layout, normal = site.layout, get_format(site.weights.format)
    joined_values, joined_scales, biases = [], [], []
    for linear in site.linears:
        codes = [_unpack(tensors[f"{linear.name}.weight_packed"], normal)]
        scales = _decode_scales(site, linear.name, tensors)
        per_row = scales.repeat_interleave(site.weights.rows_per_scale, dim=-2)
        groups = [per_row[..., : linear.rows, :]]
        if layout.outliers:
            kept = tensors[f"{linear.name}.outlier_weight"]
            codes.append(kept.float() if linear.experts is None else kept)
            groups.append(
                tensors[f"{linear.name}.outlier_scale"]
                if get_format(site.outliers.format).is_quantized
                else torch.ones(*linear.shape[:-1], layout.outlier_blocks, dtype=torch.float16)
            )
        joined_values.append(torch.cat(codes, dim=-1))
        joined_scales.append(torch.cat(groups, dim=-1))
        if site.bias:
            biases.append(
                tensors[f"{linear.name}.bias"] if linear.bias else torch.zeros(linear.shape[:-1])
            )
    values, scales = torch.cat(joined_values, dim=-2), torch.cat(joined_scales, dim=-2)
    bias = torch.cat(biases, dim=-1) if biases else None
    if (stored := stored_rows(layer, site)) is not None:
        rows = inverse_order(stored)
        values, scales = values[..., rows, :], scales[..., rows, :]
        bias = None if bias is None else bias[..., rows]
    return SiteCodes(values, scales, bias, _decode_order(site, tensors))


def _encode_scales(site: SitePlan, scales: Tensor) -> dict[str, Tensor]:  # (..., rows, G) float16
    """The stored scales of normal groups, by the last part of their names."""
    if site.weights.scale_format != "packed_multiples":
        return {"weight_scale": scales}
    lead = scales.shape[:-1]
    row_scales, multiples = split_multiples(scales.flatten(0, -2))
    packed = pack_multiples(multiples, site.blocks)
    return {"row_scale": row_scales.half().view(lead), "weight_multiple": packed.view(*lead, -1)}


def _decode_scales(site: SitePlan, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """(..., rows, G) float16; a row scale has 7 significant bits, so its multiples are exact."""
    if site.weights.scale_format != "packed_multiples":
        return tensors[f"{name}.weight_scale"]
    groups, row_scales = site.layout.num_normal_groups, tensors[f"{name}.row_scale"]
    packed = tensors[f"{name}.weight_multiple"].flatten(0, -2)
    multiples = unpack_multiples(packed, groups, site.blocks).view(*row_scales.shape, groups)
    return (row_scales.float().unsqueeze(-1) * multiples).half()


def _unpack(packed: Tensor, normal: Format) -> Tensor:
    """Values of packed codes: float32; of routed experts int8 where the format is an integer one.

    One expert after another: the steps in between take many times the memory of the codes.
    """
    if packed.ndim == 2:
        return normal.decode(unpack_bits(packed, normal.bits))
    dtype = torch.int8 if normal.is_integer else torch.float32
    return torch.stack([_unpack(own, normal).to(dtype) for own in packed])


def encode_layer(layer: LayerPlan, weights: LayerWeights) -> dict[str, Tensor]:
    """Every tensor that a checkpoint holds of a quantized layer, by its full name; on the CPU."""
    tensors: dict[str, Tensor] = {}
    for name, norm in weights.norms.items():
        tensors[f"{layer.norm_name(name)}.weight"] = norm.weight
        if norm.bias is not None:
            tensors[f"{layer.norm_name(name)}.bias"] = norm.bias
    if weights.qk_norm is not None:
        for prefix, weight in zip(layer.qk_norm_names, weights.qk_norm, strict=True):
            tensors[f"{prefix}.weight"] = weight
    if weights.key_offset is not None:
        tensors[layer.key_offset_name] = weights.key_offset
    if weights.sinks is not None:
        tensors[layer.sinks_name] = weights.sinks
    for tensor, (full_name, _) in layer.router_tensors().items():
        tensors[full_name] = weights.router[tensor]
    for site, codes in weights.sites.items():
        assert isinstance(codes, SiteCodes)
        tensors |= encode(layer, layer.sites[site], codes)
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def stored_rows(layer: LayerPlan, site: SitePlan) -> Tensor | None:
    """Row of operations at each stored row, (N,) int64; None where they are the same.

    Rows that make the input of another site are stored in the sliceable form of that input's
    order; operations have the outliers of all tensor-parallel blocks last.
    """
    if site.makes is None or layer.sites[site.makes].order != "folded":
        return None
    made = layer.sites[site.makes]
    return repeat_rows(_sliceable(made), site.rows // made.channels)


def repeat_rows(order: Tensor, times: int) -> Tensor:  # (..., I) -> (..., times * I)
    """The same order for each of `times` equal parts of the rows: gate and up, or up alone."""
    return torch.cat([order + part * order.shape[-1] for part in range(times)], dim=-1)


def _sliceable(site: SitePlan) -> Tensor:
    return sliceable_positions(site.channels, site.block_outliers, site.blocks)


def _decode_order(site: SitePlan, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """Channel order of a site's input as operations read it; None where nothing is gathered."""
    if site.order != "gathered":
        return None
    orders = [tensors[f"{linear.name}.order"] for linear in site.linears]
    if any(not torch.equal(orders[0], other) for other in orders[1:]):
        names = tuple(linear.name for linear in site.linears)
        raise CheckpointError(
            f"{names} share an input but carry different orders; the checkpoint is damaged: "
            "quantize again"
        )
    try:
        check_order(orders[0], site.channels, repeats=site.repeats_channels)
    except ShapeError as error:
        raise CheckpointError(
            f"{site.linears[0].name}.order is damaged ({error}): quantize again"
        ) from error
    return orders[0][inverse_order(_sliceable(site))]
