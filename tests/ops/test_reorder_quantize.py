"""reorder_quantize: all backends and byte layouts give the same codes, as worked out by hand."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.covering import covering

from quatom.errors import BackendError, ShapeError
from quatom.numerics.groups import GroupLayout
from quatom.ops.activations import QuantizeSpec, pack_values
from quatom.ops.backend import Backend
from quatom.ops.reorder_quantize import reorder_quantize

BACKENDS = [Backend.REFERENCE, Backend.TRITON]
CUDA = pytest.param(Backend.CUDA, marks=pytest.mark.gpu)  # byte layout `groups` alone

LAYOUTS = {
    "llama-like": GroupLayout(384, 128, 128),
    "SmolLM2: short last group": GroupLayout(512 + 32, 128, 32),
    "small groups, three outlier blocks": GroupLayout(160, 64, 96, 3),
    "no outliers": GroupLayout(192, 96),
    "whole rows": GroupLayout(320, 320),
}


def make_inputs(tokens, channels, *, seed=0, dtype=torch.float16):
    """Rows with a few large channels, as in a trained model, and a random order."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, channels, generator=rng)
    x[:, ::37] *= 30.0
    return x.to(dtype), torch.randperm(channels, generator=rng).int()


SCHEMES = [
    *((normal, "group") for normal in ("int4", "int3", "int8", "e4m3", "float16")),
    ("int4", "row"),
    ("e4m3", "row"),
    ("int4", "multiples"),
    ("int3", "multiples"),
]


# How channels are fetched does not depend on how their codes are rounded.
@pytest.mark.parametrize(
    ("layout", "scheme", "channels"),
    covering(list(LAYOUTS), SCHEMES, ("all", "some", "in place")),
)
def test_the_kernel_equals_the_reference_bit_for_bit(layout, scheme, channels, device):
    layout, (normal, scale_mode) = LAYOUTS[layout], scheme
    x, order = make_inputs(3, layout.channels)
    spec = QuantizeSpec(layout=layout, normal=normal, clip_ratio=0.9, scale_mode=scale_mode)
    if channels == "some":  # several times, others never
        order = order[torch.arange(len(order)) // 3 * 2]
    used = None if channels == "in place" else order
    on_device = None if used is None else used.to(device)
    got = reorder_quantize(x.to(device), on_device, spec, backend=Backend.TRITON)
    # The reference runs on the CPU: on a GPU torch multiplies by reciprocals of constants.
    want = reorder_quantize(x, used, spec, backend=Backend.REFERENCE)
    assert torch.equal(got.scales.cpu(), want.scales)
    assert torch.equal(got.codes.cpu(), want.codes)


BYTE_LAYOUT_AXES = (
    [
        ("int4", "group"),
        ("int2", "group"),
        ("e4m3", "group"),
        ("int8", "row"),
        ("int4", "multiples"),
        ("int2", "multiples"),
    ],
    [1, 11],
    ["random", "ties"],
)


@pytest.mark.parametrize(
    ("backend", "scheme", "tokens", "values"),
    [
        *covering(BACKENDS, *BYTE_LAYOUT_AXES, strength=3),
        *(pytest.param(*p, marks=CUDA.marks) for p in product(CUDA.values, *BYTE_LAYOUT_AXES)),
    ],
)
def test_both_byte_layouts_mean_the_same(backend, scheme, tokens, values, device):
    (normal, scale_mode), halves = scheme, values == "ties"
    layout = GroupLayout(224, 96, 64, 2)
    x, order = make_inputs(tokens, layout.channels, seed=tokens)
    if halves:  # steps of 1 in every group: half of all codes are ties
        x = torch.round(x * 2).clamp(-14, 14) / 2
        x[:, order[::32].long()] = 7.0
    rows = QuantizeSpec(
        layout=layout,
        normal=normal,
        clip_ratio=1.0 if halves else 0.9,
        scale_mode=scale_mode,
    )
    want = reorder_quantize(x, order, rows, backend=Backend.REFERENCE)
    spec = replace(rows, byte_layout="groups")
    got = reorder_quantize(x.to(device), order.to(device), spec, backend=backend)
    assert got.codes.shape == (layout.num_scales, -(-tokens // 16) * 16, 128)
    assert torch.equal(got.dequantize().cpu(), want.dequantize())
    by_groups = reorder_quantize(x, order, spec, backend=Backend.REFERENCE)
    assert torch.equal(got.canonical()[0].cpu(), by_groups.canonical()[0])
    assert torch.equal(got.canonical()[1].cpu(), by_groups.canonical()[1])
    if scale_mode != "multiples":  # whose multiples are in the codes
        assert torch.equal(got.canonical()[0].cpu(), want.canonical()[0])
        assert torch.equal(got.canonical()[1].cpu(), want.canonical()[1])
    # What `linear` on Hopper adds for weights that are stored 8 too large, in its own steps.
    sums = torch.stack([v.sum(1) for v in want.codes.float().split(layout.group_sizes, 1)], 1)
    is_int8 = normal == "int8" or scale_mode == "multiples"
    sums[:, 0 if is_int8 else layout.num_normal_groups :] = 0.0
    unit = 2.0**-9 if normal == "e4m3" else 2.0**-18
    correction = got.corrections().cpu()
    torch.testing.assert_close(correction, -8 * sums * want.scales * unit, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("backend", "tokens"),
    [
        (Backend.REFERENCE, 4),
        (Backend.TRITON, 4),
        pytest.param(Backend.CUDA, 4, marks=pytest.mark.gpu),
        pytest.param(Backend.CUDA, 600, marks=pytest.mark.gpu),  # two tokens a CTA
    ],
)
def test_ties_are_ties_for_every_scale(backend, tokens, device):
    """The product with a rounded reciprocal of these scales misses some ties by an ulp."""
    scales = torch.tensor([7.0, 13.0, 15.0, 28.0])
    codes = torch.arange(-7, 7) + 0.5
    x = torch.zeros(4, 64)
    x[:, :14] = scales[:, None] * codes
    x[:, 14] = scales * 7
    x = x.repeat(tokens // 4, 1).half().to(device)
    spec = QuantizeSpec(layout=GroupLayout(64, 64), byte_layout="groups")
    got, got_scales = reorder_quantize(x, None, spec, backend=backend).canonical()
    assert torch.equal(got_scales[:4, 0].cpu(), scales)
    assert torch.equal(got[:, :14].cpu(), torch.round(codes).expand(tokens, 14))


@pytest.mark.parametrize("backend", [*BACKENDS, CUDA])
def test_channels_beyond_a_group_are_zero_bytes(backend, device):
    layout = GroupLayout(96, 96, 32)
    x, _ = make_inputs(8, layout.channels)
    spec = QuantizeSpec(layout=layout, byte_layout="groups")
    codes = reorder_quantize(x.to(device), None, spec, backend=backend).codes.cpu()
    # A short group's zeros are pieces 6 and 7 (of 16 bytes), at places 6 ^ t and 7 ^ t.
    for token in range(8):
        for piece in (6, 7):
            place = (piece ^ token) * 16
            assert not codes[0, token, place : place + 16].any()
        assert codes[1, token].count_nonzero() <= 32


def test_padded_codes_are_the_rows_cut_into_equally_wide_groups():
    layout = GroupLayout(80, 32, 64, outlier_blocks=2)  # groups of 32, 32, 16, 32 and 32
    x, order = make_inputs(5, layout.channels)
    rows = reorder_quantize(x, order, QuantizeSpec(layout=layout, clip_ratio=0.9))
    padded = QuantizeSpec(layout=layout, clip_ratio=0.9, byte_layout="padded")
    got = reorder_quantize(x, order, padded)
    assert got.codes.shape == (5, 5, 32)
    for group, want in enumerate(rows.codes.split(layout.group_sizes, dim=1)):
        assert torch.equal(got.codes[:, group, : want.shape[1]], want)
    assert torch.equal(got.scales, rows.scales)
    assert torch.equal(got.dequantize(), rows.dequantize())
    packed = pack_values(*rows.canonical(), padded, rows.dtype)
    assert torch.equal(packed.dequantize(), rows.dequantize())


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_channel_at_a_time_lands_where_the_order_says(backend, device):
    layout = GroupLayout(32, 32, 32)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(3)).int()
    x = torch.eye(64, dtype=torch.float16, device=device)
    for byte_layout in ("rows", "groups"):
        spec = QuantizeSpec(layout=layout, byte_layout=byte_layout)
        real = reorder_quantize(x, order.to(device), spec, backend=backend).dequantize().cpu()
        assert torch.equal(real.argmax(dim=0), order.long())
        assert torch.equal(real.count_nonzero(dim=0), torch.ones(64, dtype=torch.long))


# Rows whose codes can be worked out by hand. Each pins one rule that random data cannot see.
HAND_ROWS = {
    "ties go to even": ("int4", [7, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5], [7, 0, 2, 2, 0, -2, -2], 1.0),
    # scale 0.9: 7 / 0.9 = 7.8 saturates upwards at 7 but reaches -8 downwards.
    "clipping is two's complement": ("int4", [7, -7, 3.5], [7, -8, 4], 0.9),
    # The float32 step 1.00042 is stored as float16 1.0: 2.5005 / 1.0 rounds to 3, not to 2.
    "the stored step divides": ("int4", [7.003, 2.501], [7, 3], 1.0),
    # 1 / 1.1 of 2**-14 would be 0; the smallest step keeps codes small instead of huge.
    "the smallest step is 2**-14": ("int4", [2.0**-14, -(2.0**-13)], [1, -2], 1.0),
    "int8 goes to -128": ("int8", [127, -127, 0.5, 1.5], [127, -128, 1, 2], 0.99),
    # 17 and 19 lie between e4m3 neighbours 16, 18, 20; 2**-10 is half the smallest subnormal.
    "e4m3 ties go to even": ("e4m3", [448, 17, 19, -17, 2.0**-10], [448, 16, 20, -16, 0], 1.0),
    "e4m3 saturates": ("e4m3", [448, -448], [448, -448], 0.5),
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", HAND_ROWS)
def test_codes_worked_out_by_hand(backend, rule, device):
    normal, values, codes, clip_ratio = HAND_ROWS[rule]
    x = torch.zeros(1, 64, dtype=torch.float32, device=device)
    x[0, : len(values)] = torch.tensor(values, dtype=torch.float32)
    spec = QuantizeSpec(layout=GroupLayout(64, 64), normal=normal, clip_ratio=clip_ratio)
    got = reorder_quantize(x, None, spec, backend=backend).canonical()[0]
    assert got[0, : len(codes)].tolist() == codes


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**16), gain=st.floats(1e-3, 1e3))
def test_the_error_is_at_most_half_a_step_without_clipping(seed, gain):
    layout = GroupLayout(224, 64, 32)
    x, order = make_inputs(2, layout.channels, seed=seed, dtype=torch.float32)
    x *= gain
    quantized = reorder_quantize(x, order, QuantizeSpec(layout=layout))
    error = (quantized.dequantize() - x[:, order.long()]).abs()
    step = quantized.scales.repeat_interleave(torch.tensor(layout.group_sizes), dim=1)
    # The scale itself is rounded to float16, so the extreme code may miss by 127 * 2**-11 steps.
    assert (error <= step * (0.5 + 127 * 2**-11)).all()


def test_outliers_are_not_clipped():
    layout = GroupLayout(64, 64, 32)
    x, _ = make_inputs(2, 96)
    clipped = reorder_quantize(x, None, QuantizeSpec(layout=layout, clip_ratio=0.5))
    whole = reorder_quantize(x, None, QuantizeSpec(layout=layout, clip_ratio=1.0))
    assert torch.equal(clipped.codes[:, 64:], whole.codes[:, 64:])
    assert not torch.equal(clipped.codes[:, :64], whole.codes[:, :64])


def test_no_tokens_and_zero_tokens_are_fine(device):
    layout = GroupLayout(64, 64, 32)
    for backend in BACKENDS:
        spec = QuantizeSpec(layout=layout, byte_layout="groups")
        empty = torch.empty(0, 96, dtype=torch.float16, device=device)
        assert reorder_quantize(empty, None, spec, backend=backend).dequantize().shape == (0, 96)
        zeros = torch.zeros(2, 96, dtype=torch.float16, device=device)
        quantized = reorder_quantize(zeros, None, spec, backend=backend)
        assert not quantized.dequantize().any()
        assert quantized.canonical()[1].isfinite().all()


def test_errors_name_the_numbers_and_the_remedy():
    layout = GroupLayout(256, 256)
    x, order = make_inputs(1, 256)
    with pytest.raises(ShapeError, match=r"x \(T, 256\).*got \(1, 250\)"):
        reorder_quantize(x[:, :250], order, QuantizeSpec(layout=layout))
    with pytest.raises(ShapeError, match=r"order \(256,\); got \(10,\)"):
        reorder_quantize(x, order[:10], QuantizeSpec(layout=layout))
    with pytest.raises(ShapeError, match=r"at most 128 channels per group, this layout has 256"):
        QuantizeSpec(layout=layout, byte_layout="groups")
    with pytest.raises(ShapeError, match=r"not int7 and int8"):
        QuantizeSpec(layout=GroupLayout(64, 64), normal="int7", byte_layout="groups")
    with pytest.raises(ShapeError, match=r"int8 groups of one scale per token.*'row'"):
        QuantizeSpec(layout=GroupLayout(128, 64), normal="int8", byte_layout="groups")
    with pytest.raises(ShapeError, match=r"multiples of int2 to int4 codes, not of int8"):
        QuantizeSpec(
            layout=GroupLayout(64, 64),
            normal="int8",
            scale_mode="multiples",
            byte_layout="groups",
        )
    with pytest.raises(ShapeError, match=r"holds int2 to int8, not e4m3 and int8.*'rows'"):
        QuantizeSpec(layout=layout, normal="e4m3", byte_layout="padded")
    with pytest.raises(BackendError, match=r"not 'padded'.*use the reference"):
        reorder_quantize(
            x, order, QuantizeSpec(layout=layout, byte_layout="padded"), backend=Backend.TRITON
        )
    with pytest.raises(BackendError, match=r"no format e2m1; use the reference"):
        reorder_quantize(
            x, order, QuantizeSpec(layout=layout, normal="e2m1"), backend=Backend.TRITON
        )
