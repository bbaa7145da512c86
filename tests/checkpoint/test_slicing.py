"""A checkpoint made for tensor_parallel B is loaded by B ranks as plain slices."""

from dataclasses import replace

import pytest
import torch

from quatom.checkpoint.schema import linear_tensors
from quatom.families.registry import read_config
from quatom.numerics.formats import get_format
from quatom.numerics.groups import GroupLayout, dequantize_groups
from quatom.numerics.packing import unpack_bits
from quatom.numerics.reorder import channel_order, inverse_order, sliceable_positions
from quatom.plan import plan
from quatom.presets import PRESETS
from quatom.recipe import ActivationSpec, WeightSpec
from tests.checkpoint.models import CONFIG, random_tensor

MODEL = read_config(CONFIG | {"hidden_size": 256, "intermediate_size": 512})
O_PROJ = "model.layers.0.self_attn.o_proj"


def dequantize(tensors, layout):
    """(N, K) float32 from the stored tensors of a linear, or of a slice of it."""
    codes = get_format("int4").decode(unpack_bits(tensors["weight_packed"], 4))
    scales = tensors["weight_scale"].repeat_interleave(2, dim=0)
    values = torch.cat((codes, tensors["outlier_weight"].float()), dim=1)
    return dequantize_groups(values, torch.cat((scales, tensors["outlier_scale"]), dim=1), layout)


@pytest.mark.parametrize(("blocks", "ranks"), [(2, 2), (4, 2), (4, 4)])
def test_the_parts_of_a_row_parallel_linear_add_up(blocks, ranks):
    recipe = replace(
        PRESETS["atom-w4a4kv4"],
        tensor_parallel=blocks,
        weights=WeightSpec(group_size=32, rows_per_scale=2),
        activations=ActivationSpec(group_size=32),
    )
    site = plan(MODEL, recipe).layers[0].sites["o"]
    whole, channels = site.layout, site.channels
    width = channels // blocks
    outliers = whole.outliers // blocks
    tensors = {
        name.removeprefix(f"{O_PROJ}."): random_tensor(name, spec)
        for name, spec in linear_tensors(site, site.linears[0]).items()
    }
    scores = torch.rand(channels, generator=torch.Generator().manual_seed(0))
    order = channel_order(scores, outliers, blocks)
    tensors["order"] = order[sliceable_positions(channels, outliers, blocks)]
    x = torch.randn(3, channels, generator=torch.Generator().manual_seed(1))
    want = x[:, order] @ dequantize(tensors, whole).T

    total = torch.zeros_like(want)
    for rank in range(ranks):
        # Every tensor with an axis along K is cut into equal slices along it, order included.
        part = {name: t.chunk(ranks, dim=-1)[rank] for name, t in tensors.items()}
        local = part["order"] - rank * (channels // ranks)
        assert local.min() == 0
        assert local.max() == channels // ranks - 1  # its own channels, and only they
        layout = GroupLayout(
            normal=whole.normal // ranks,
            group_size=whole.group_size,
            outliers=whole.outliers // ranks,
            outlier_blocks=blocks // ranks,
        )
        positions = sliceable_positions(width * blocks // ranks, outliers, blocks // ranks)
        gathered = x.chunk(ranks, dim=-1)[rank][:, local[inverse_order(positions)]]
        total += gathered @ dequantize(part, layout).T
    # The same products summed in another order, in float32.
    torch.testing.assert_close(total, want, rtol=1e-4, atol=1e-3 * want.abs().max().item())
