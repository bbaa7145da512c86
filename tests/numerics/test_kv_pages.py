"""KVPages: bytes, rounding rules, and that only the addressed slots change."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quatom.errors import ShapeError
from quatom.numerics.kv_codes import (
    asymmetric_codes,
    asymmetric_range,
    pack_halves,
    unpack_halves,
)
from quatom.numerics.kv_pages import HEAD_DIMS, KVPages

DTYPES = ["int4", "int8", "float16", "bfloat16", "float32"]


HEAD_DIM_FORMATS = [
    (d, dtype) for d in (80, 100, 112, 192) for dtype in ("int4", "int8", "float16")
]


def make_pages(dtype="int4", blocks=6, block_size=16, heads=2, head_dim=64):
    return KVPages.allocate(blocks, block_size, heads, head_dim, dtype, "cpu")


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_an_int4_token_head_is_half_a_byte_a_channel_and_four_bytes(head_dim):
    pages = make_pages(heads=3, head_dim=head_dim)
    assert pages.bytes_per_token == 3 * 2 * (head_dim // 2 + 4)
    assert pages.bytes_per_block == 16 * pages.bytes_per_token
    assert pages.storage.nbytes == pages.num_blocks * pages.bytes_per_block
    # Vector loads and bulk copies need every section of every record on a 16-byte boundary.
    for section in (pages.keys, pages.values, pages.key_pairs, pages.value_pairs):
        assert section.data_ptr() % 16 == 0
        assert section.stride(1) * section.element_size() % 16 == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_sections_tile_a_record_without_overlap(dtype):
    pages = make_pages(dtype)
    sections = [pages.keys, pages.values]
    sections += [pages.key_pairs, pages.value_pairs] if pages.quantized else []
    for code, section in enumerate(sections, start=1):
        section.view(torch.uint8).fill_(code)
    record = pages.storage[3, 1]
    assert (record != 0).all()
    assert (record.diff() >= 0).all()


# Rows whose codes can be worked out by hand; each pins a rule that random data cannot see.
HAND_ROWS = {
    # Range 0 to 15 makes the step 1: halves are ties and go to even.
    "ties go to even": ([0, 15, 0.5, 1.5, 2.5, 3.5], 1.0, [0, 15, 0, 2, 2, 4], 1.0, 0.0),
    # All positive: the minimum is kept, no zero point to saturate.
    "one-sided": ([100, 107.5, 104], 1.0, [0, 15, 8], 0.5, 100.0),
    # Constant: the scale floor, code 0, and the value itself comes back.
    "constant": ([3, 3, 3], 1.0, [0, 0, 0], 2.0**-14, 3.0),
    # min 0.1 is stored as float16 0.0999756: the stored minimum is subtracted, the top still fits.
    "stored minimum": ([0.1, 15.1], 1.0, [0, 15], 1.0, 0.0999755859375),
    # float32 step 1.000427 is stored as 1.0: 2.5011 is 2.5011 steps, not 2.49999 (which is 2).
    "stored scale divides": ([0, 15.0064, 2.5003], 1.0, [0, 15, 3], 1.0, 0.0),
    # Clipped by a half: 0..16 becomes 4..12, step 8 / 15 -> 0.5332; beyond it codes saturate.
    "clipping moves both ends": ([0, 16, 4, 8], 0.5, [0, 15, 0, 8], 0.533203125, 4.0),
}


@pytest.mark.parametrize("rule", HAND_ROWS)
def test_codes_worked_out_by_hand(rule):
    values, clip_ratio, codes, want_scale, want_minimum = HAND_ROWS[rule]
    x = torch.tensor(values, dtype=torch.float32)
    scale, minimum = asymmetric_range(x, 4, clip_ratio)
    assert (scale.item(), minimum.item()) == (want_scale, want_minimum)
    assert asymmetric_codes(x, scale, minimum, 4).tolist() == codes


def test_a_float32_row_beyond_float16_stays_finite():
    x = torch.tensor([-1e6, 0.0, 1e6])
    scale, minimum = asymmetric_range(x, 4)
    assert scale.isfinite().all()
    assert minimum.isfinite().all()


def test_channel_j_shares_a_byte_with_channel_j_plus_half():
    codes = torch.arange(8, dtype=torch.uint8)
    assert pack_halves(codes).tolist() == [0x40, 0x51, 0x62, 0x73]
    assert torch.equal(unpack_halves(pack_halves(codes)), codes)


@pytest.mark.parametrize(("head_dim", "dtype"), HEAD_DIM_FORMATS)
def test_heads_of_other_sizes_come_back_too(head_dim, dtype):
    """100 channels take 50 bytes of INT4 codes, which are no whole 4-byte words."""
    rng = torch.Generator().manual_seed(head_dim)
    pages = make_pages(dtype, head_dim=head_dim)
    pages.storage.fill_(0xA5)
    k, v = torch.randn(2, 21, 2, head_dim, generator=rng).unbind()
    table = torch.tensor([4, 1])
    position = torch.arange(21)
    pages.append(k, v, table[position // 16] * 16 + position % 16)
    for want, got in zip((k, v), pages.gather(table, 21), strict=True):
        if pages.quantized:
            scale, minimum = asymmetric_range(want, pages.bits)
            want = asymmetric_codes(want, scale, minimum, pages.bits) * scale.float() + minimum
        assert torch.equal(got, want.half().float() if dtype == "float16" else want)
    others = torch.ones(6, dtype=torch.bool).index_fill(0, table, False)
    assert (pages.storage[others] == 0xA5).all()


@pytest.mark.parametrize("dtype", DTYPES)
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**16), offset=st.floats(-50, 50), gain=st.floats(0.01, 100))
def test_gather_returns_what_append_wrote(dtype, seed, offset, gain):
    rng = torch.Generator().manual_seed(seed)
    pages = make_pages(dtype)
    table = torch.randperm(6, generator=rng)[:3].int()
    length = int(torch.randint(1, 49, (), generator=rng))
    k, v = (gain * torch.randn(length, 2, 64, generator=rng) + offset for _ in range(2))
    position = torch.arange(length)
    pages.append(k, v, table.long()[position // 16] * 16 + position % 16)
    for want, got in zip((k, v), pages.gather(table, length), strict=True):
        if not pages.quantized:
            assert torch.equal(got, want.to(getattr(torch, dtype)).float())
            continue
        scale, minimum = asymmetric_range(want, pages.bits)
        # Half a step, plus float16 rounding of the minimum (2**-11 of it) and of the scale, whose
        # error the top code multiplies by 2**bits - 1.
        bound = scale.float() * (0.5 + (2**pages.bits - 1) * 2**-11) + minimum.abs() * 2**-11
        assert ((got - want).abs() <= bound + 1e-6).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_append_touches_its_slots_alone_and_skips_padding(dtype):
    pages = make_pages(dtype)
    pages.storage.fill_(0xA5)
    before = pages.storage.clone()
    k = torch.randn(3, 2, 64)
    pages.append(k, -k, torch.tensor([17, -1, 40]))
    touched = torch.zeros(6, 16, dtype=torch.bool)
    touched[1, 1] = touched[2, 8] = True
    for section in ("keys", "values") + (("key_pairs", "value_pairs") if pages.quantized else ()):
        new = getattr(pages, section).view(torch.uint8)
        old = getattr(KVPages(before, 16, 64, dtype), section).view(torch.uint8)
        changed = (new != old).any(dim=-1).any(dim=1)  # (P, S)
        assert not changed[~touched].any()
        assert changed[touched].all()


def test_copy_blocks_copies_whole_blocks():
    pages = make_pages()
    pages.storage.random_(0, 256)
    before = pages.storage.clone()
    pages.copy_blocks(torch.tensor([0, 4]), torch.tensor([5, 1]))
    assert torch.equal(pages.storage[5], before[0])
    assert torch.equal(pages.storage[1], before[4])
    assert torch.equal(pages.storage[[0, 2, 3, 4]], before[[0, 2, 3, 4]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 16, 2, 72, "int4"), "head_dim 72 is not supported.* 64, 80, 96, 100, 112"),
        ((4, 24, 2, 64, "int4"), "block_size 24 is not a positive multiple of 16"),
        ((4, 16, 2, 64, "int3"), "got 'int3'"),
        ((0, 16, 2, 64, "int4"), "0 blocks"),
    ],
)
def test_allocation_errors_name_the_numbers(arguments, message):
    with pytest.raises(ShapeError, match=message):
        KVPages.allocate(*arguments, "cpu")


def test_shape_errors_name_the_numbers():
    with pytest.raises(ShapeError, match=r"\(2, 2, 64\).*got \(2, 3, 64\)"):
        make_pages().append(torch.zeros(2, 3, 64), torch.zeros(2, 2, 64), torch.tensor([0, 1]))
    with pytest.raises(ShapeError, match="float16 cache has no"):
        _ = make_pages("float16").key_pairs
