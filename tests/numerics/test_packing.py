"""Packing of 2 to 8 bit codes against a bit string built digit by digit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quatom.errors import ShapeError
from quatom.numerics.packing import pack_bits, packed_bytes, unpack_bits


def pack_slowly(codes: list[int], bits: int) -> list[int]:
    """Write every bit into a list, then read it in eights, least significant first."""
    string = [(code >> b) & 1 for code in codes for b in range(bits)]
    return [
        sum(bit << place for place, bit in enumerate(string[start : start + 8]))
        for start in range(0, len(string), 8)
    ]


@settings(deadline=None, max_examples=60)
@given(data=st.data(), bits=st.integers(2, 8), eights=st.integers(1, 6))
def test_bytes_are_those_of_the_bit_string(data, bits, eights):
    row = st.lists(st.integers(0, 2**bits - 1), min_size=8 * eights, max_size=8 * eights)
    rows = [data.draw(row), data.draw(row)]
    packed = pack_bits(torch.tensor(rows, dtype=torch.uint8), bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [pack_slowly(codes, bits) for codes in rows]
    assert packed.shape[-1] == packed_bytes(8 * eights, bits)
    assert unpack_bits(packed, bits).tolist() == rows


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_code_survives_at_every_place(bits):
    codes = torch.arange(2**bits, dtype=torch.uint8)
    rows = torch.stack([codes.roll(shift) for shift in range(8)])
    rows = rows if rows.shape[-1] % 8 == 0 else rows.repeat(1, 2)
    assert torch.equal(unpack_bits(pack_bits(rows, bits), bits), rows)


def test_four_bit_codes_have_the_even_channel_low():
    assert pack_bits(torch.tensor([0x1, 0x2, 0xA, 0xF], dtype=torch.uint8), 4).tolist() == [
        0x21,
        0xFA,
    ]


def test_codes_that_fill_no_whole_bytes_are_refused():
    with pytest.raises(ShapeError, match=r"12 codes of 3 bits are 36 bits"):
        pack_bits(torch.zeros(12, dtype=torch.uint8), 3)
