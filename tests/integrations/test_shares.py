"""A rank of vLLM's computes its part from slices of what is stored; the parts add up."""

from dataclasses import replace

import pytest
import torch

from quatom.checkpoint.codec import decode
from quatom.checkpoint.schema import linear_tensors
from quatom.errors import CheckpointError, RecipeError
from quatom.families.registry import read_config
from quatom.integrations.vllm import TRIED, check_version
from quatom.integrations.vllm.opaque import as_argument
from quatom.integrations.vllm.operator import name_scheme, site_linear
from quatom.integrations.vllm.shares import check_degree, share_of
from quatom.numerics.groups import GroupLayout, dequantize_groups
from quatom.numerics.hadamard import rotate_groups
from quatom.numerics.reorder import channel_order, inverse_order, sliceable_positions
from quatom.ops.backend import Backend
from quatom.ops.linear import prepare_weights
from quatom.ops.reorder_quantize import reorder_quantize
from quatom.plan import plan
from tests.checkpoint.models import CONFIG, random_tensor
from tests.integrations.checkpoints import tiny_recipe

MODEL = CONFIG | {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 8}
K_HEADS = 2


def planned(blocks):
    recipe = tiny_recipe("atom-w4a4kv4", tensor_parallel=blocks)
    return plan(read_config(MODEL), recipe), recipe


def stored(site):
    """Random tensors of a site, its order block-diagonal."""
    tensors = {}
    for linear in site.linears:
        for name, spec in linear_tensors(site, linear).items():
            tensors[name] = random_tensor(name, spec)
    if site.order == "gathered":
        scores = torch.rand(site.channels, generator=torch.Generator().manual_seed(0))
        order = channel_order(scores, site.block_outliers, site.blocks)
        order = order[sliceable_positions(site.channels, site.block_outliers, site.blocks)]
        for linear in site.linears:
            tensors[f"{linear.name}.order"] = order.int()
    return tensors


def rank_rows(site, degree):
    """Rows that vLLM gives a rank of each part of the fused linear."""
    if site.name in ("o", "down"):
        return [site.rows]
    rows = [linear.rows // degree for linear in site.linears]
    if site.name == "qkv":
        head = site.linears[1].rows // K_HEADS
        rows[1:] = [max(r, head) for r in rows[1:]]
    return rows


def rank_codes(layer, site, recipe, tensors, rank, degree):
    share = share_of(
        layer, site, recipe, partitions=rank_rows(site, degree), rank=rank, degree=degree
    )
    loaded = {}
    for suffix in share.tensors():
        for number, linear in enumerate(site.linears):
            whole = tensors[f"{linear.name}.{suffix}"]
            for piece, part in share.slices(suffix, whole, number).items():
                loaded[f"{share.site.linears[piece].name}.{suffix}"] = part
    return share, decode(share.layer, share.site, loaded)


def dense(site, codes):
    """The weight in the channel order of the input, where that is stored; (N, K)."""
    weight = dequantize_groups(codes.values, codes.scales, site.layout)
    if codes.order is None:
        return weight
    out = torch.empty_like(weight)
    out[:, codes.order] = weight
    return out


@pytest.mark.parametrize("name", ["qkv", "o"])
@pytest.mark.parametrize(("blocks", "degree"), [(2, 2), (4, 2), (4, 4)])
def test_ranks_hold_the_weight_between_them(name, blocks, degree):
    resolved, recipe = planned(blocks)
    layer = resolved.layers[0]
    site = layer.sites[name]
    tensors = stored(site)
    whole = dense(site, decode(layer, site, tensors))
    shares = [rank_codes(layer, site, recipe, tensors, r, degree) for r in range(degree)]
    if name == "o":
        parts = [dense(share.site, codes) for share, codes in shares]
        assert torch.equal(torch.cat(parts, dim=1), whole)
        return
    for linear, part in zip(site.linears, range(3), strict=True):
        pieces = [dense(s.site, c)[s.site.linears[part].row_range] for s, c in shares]
        copies = degree * pieces[0].shape[0] // linear.rows
        assert torch.equal(torch.cat(pieces[::copies]), whole[linear.row_range])
        for i, piece in enumerate(pieces):  # heads of k and v that several ranks hold
            assert torch.equal(piece, pieces[i // copies * copies])


@pytest.mark.parametrize("degree", [1, 2, 4])
def test_gated_feed_forward_parts_add_up(degree):
    """Rows of gate and up are made in the very order in which a rank's down reads them."""
    resolved, recipe = planned(4)
    layer = resolved.layers[0]
    ups, downs = layer.sites["gate_up"], layer.sites["down"]
    up_tensors, down_tensors = stored(ups), stored(downs)
    x = torch.randn(3, ups.channels, generator=torch.Generator().manual_seed(1))

    def feed(rank, degree):
        up = rank_codes(layer, ups, recipe, up_tensors, rank, degree)
        down = rank_codes(layer, downs, recipe, down_tensors, rank, degree)
        gate, value = (x @ dense(up[0].site, up[1]).T).chunk(2, dim=1)
        return (gate * value) @ dense(down[0].site, down[1]).T

    whole = feed(0, 1)
    total = sum(feed(rank, degree) for rank in range(degree))
    # The same products summed in another order, in float32.
    torch.testing.assert_close(total, whole, rtol=1e-4, atol=1e-4 * whole.abs().max().item())


def test_a_degree_that_does_not_divide_is_refused_with_both_numbers():
    _, recipe = planned(4)
    with pytest.raises(RecipeError, match=r"over 8 ranks does not divide .* tensor_parallel 4"):
        check_degree(recipe, 8)
    check_degree(recipe, 4)


def test_an_order_that_crosses_ranks_is_refused():
    resolved, recipe = planned(2)
    layer = resolved.layers[0]
    site = layer.sites["o"]
    tensors = stored(site)
    name = f"{site.linears[0].name}.order"
    tensors[name] = tensors[name].flip(0)
    with pytest.raises(CheckpointError, match="names channels of other ranks"):
        rank_codes(layer, site, recipe, tensors, 0, 2)


def test_untried_versions_are_refused():
    for version in TRIED:
        check_version(f"{version}+cpu")
    with pytest.raises(Exception, match=r"tried with vLLM .* this is 0\.25\.1: install"):
        check_version("0.25.1")


@pytest.mark.parametrize("name", ["quatom-w4a8kv4", "w4a16", "w8a8"])
def test_the_operator_is_one_that_torch_compile_can_trace(name):
    recipe = tiny_recipe(name)
    layer = plan(read_config(MODEL), recipe).layers[0]
    site = layer.sites["o"]
    codes = decode(layer, site, stored(site))
    prepared = prepare_weights(
        codes.values,
        codes.scales,
        site.layout,
        weight_format=site.weights.format,
        activation_format=site.activation_format,
        scale_mode=site.scale_mode,
    )
    spec = None if site.input_spec is None else prepared.input_spec(site.input_spec)
    scheme = name_scheme(spec, prepared)
    order = None if codes.order is None else codes.order.int()
    x = torch.randn(5, site.channels, generator=torch.Generator().manual_seed(2))
    weights = [as_argument(tensor) for tensor in prepared.tensors]
    arguments = (x, order, weights, torch.randn(site.rows), scheme)
    torch.library.opcheck(torch.ops.quatom.site_linear.default, arguments)
    assert torch.equal(torch.ops.quatom.site_linear(*arguments), site_linear(*arguments))


def test_weights_that_a_library_packs_are_told_by_number(monkeypatch):
    """As on a CPU with AVX-512 VNNI; any CPU can make a tensor without storage."""
    layout = GroupLayout(64, 32)
    values, scales = torch.randint(-7, 8, (32, 64)), torch.rand(32, layout.num_scales).half()
    prepared = prepare_weights(values, scales, layout, activation_format="float16")
    dense = prepared.tensors[0]
    packed = replace(prepared, backend=Backend.REFERENCE, tensors=(dense.to_mkldnn(), dense))

    def multiply(x, prepared):
        assert prepared.tensors[0] is packed.tensors[0]
        return x.float() @ prepared.tensors[0].to_dense().t()

    monkeypatch.setattr("quatom.integrations.vllm.operator.linear", multiply)
    weights = [as_argument(tensor) for tensor in packed.tensors]
    assert weights[1] is dense
    arguments = (torch.randn(5, 64), None, weights, None, name_scheme(None, packed))
    torch.library.opcheck(torch.ops.quatom.site_linear.default, arguments)
    assert torch.equal(torch.ops.quatom.site_linear(*arguments), arguments[0] @ dense.t())


@pytest.mark.parametrize("name", ["o", "down"])
def test_a_scale_per_rank_loses_less_than_one_for_all(name):
    """Each rank's largest magnitude is at most that of all: scales get finer, errors smaller."""
    recipe = tiny_recipe("quatom-w4a8kv4", tensor_parallel=4)
    layer = plan(read_config(MODEL), recipe).layers[0]
    site = layer.sites[name]
    tensors = stored(site)
    x = torch.randn(64, site.channels, generator=torch.Generator().manual_seed(3))
    x[:, ::40] *= 8

    def multiply(rank, degree, quantizes=True):
        share, codes = rank_codes(layer, site, recipe, tensors, rank, degree)
        own = share.site
        part = x.chunk(degree, dim=1)[rank] if codes.order is not None else folded(rank, degree)
        if quantizes:
            part = reorder_quantize(part.contiguous(), codes.order, own.input_spec).dequantize()
        else:
            part = part if codes.order is None else part[:, codes.order]
            part = rotate_groups(part, own.layout)
        return part @ dequantize_groups(codes.values, codes.scales, own.layout).T

    def folded(rank, degree):
        """Down's input in the order of one rank's operations."""
        slices = x[:, sliceable_positions(site.channels, site.block_outliers, site.blocks)]
        part = slices.chunk(degree, dim=1)[rank]
        blocks = site.blocks // degree
        own = sliceable_positions(site.channels // degree, site.block_outliers, blocks)
        return part[:, inverse_order(own)]

    exact = multiply(0, 1, quantizes=False)
    whole = (multiply(0, 1) - exact).norm()
    ranks = (sum(multiply(rank, 4) for rank in range(4)) - exact).norm()
    assert ranks < whole
