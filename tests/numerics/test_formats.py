"""Number formats: every value there and back, ties, saturation."""

import pytest
import torch

from quatom.errors import RecipeError
from quatom.numerics.formats import get_format

INTEGERS = [f"int{bits}" for bits in range(2, 9)]
CODED = [*INTEGERS, "odd4", "e2m1", "e4m3"]

# Values by code, written out: the signed magnitudes of OCP's 4-bit float.
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E2M1 = E2M1 + [-x for x in E2M1]


def all_patterns(name):
    return torch.arange(2 ** get_format(name).bits, dtype=torch.uint8)


def finite_patterns(name):
    patterns = all_patterns(name)
    return patterns[torch.isfinite(get_format(name).decode(patterns))]


@pytest.mark.parametrize("name", CODED)
def test_every_pattern_decodes_to_a_value_that_encodes_back(name):
    fmt = get_format(name)
    patterns = finite_patterns(name)
    # e4m3 spends two patterns on NaN; every other format uses them all.
    assert len(patterns) == 2**fmt.bits - (2 if name == "e4m3" else 0)
    assert torch.equal(fmt.encode(fmt.decode(patterns)), patterns)


@pytest.mark.parametrize("name", CODED)
def test_every_value_rounds_to_itself(name):
    fmt = get_format(name)
    values = fmt.decode(finite_patterns(name))
    assert torch.equal(fmt.round(values.clone()), values)
    assert values.max() == fmt.largest


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_are_twos_complement(name):
    bits = get_format(name).bits
    half = 2 ** (bits - 1)
    want = list(range(half)) + list(range(-half, 0))
    assert get_format(name).decode(all_patterns(name)).tolist() == want


def test_e2m1_has_the_sixteen_values_of_the_ocp_format():
    assert get_format("e2m1").decode(all_patterns("e2m1")).tolist() == E2M1


def test_odd4_has_the_odd_integers_and_no_zero():
    fmt = get_format("odd4")
    want = [*range(1, 16, 2), *range(-15, 0, 2)]  # two's complement code c stands for 2 c + 1
    assert fmt.decode(all_patterns("odd4")).tolist() == want
    assert (fmt.integer_bits, get_format("int4").integer_bits) == (5, 4)
    assert get_format("e2m1").integer_bits == 0


ROUND_ROWS = {
    "int2": ([0.5, 1.5, -0.5, -1.5, -2.5, 9.0, -9.0], [0, 1, 0, -2, -2, 1, -2]),
    "int3": ([0.5, 1.5, 2.5, 3.4, 3.6, -3.5, -4.5], [0, 2, 2, 3, 3, -4, -4]),
    "int4": ([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 7.4, 7.6, -8.9], [0, 2, 2, 0, -2, -2, 7, 7, -8]),
    # A middle goes up.
    "odd4": (
        [0.0, 0.1, -0.1, 2.0, 4.0, -2.0, 14.9, 99.0, -99.0],
        [1, 1, -1, 3, 5, -1, 15, 15, -15],
    ),
    "int8": ([0.5, 1.5, 126.5, 127.5, 1e9, -128.5, -1e9], [0, 2, 126, 127, 127, -128, -128]),
    # Midpoints go to the neighbour whose code (mantissa bit) is even: 0, 1, 2 and 4.
    "e2m1": (
        [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.75, -5.0, 6.1, 1e9, -1e9, 0.2501, 4.9999],
        [0, 1, 1, 2, 2, 4, 4, -1, -4, 6, 6, -6, 0.5, 4],
    ),
    # Spacing is 2 between 16 and 32, and 32 from 256 to 448; the smallest step is 2**-9.
    "e4m3": (
        [17.0, 19.0, 272.0, 304.0, 464.0, 1e9, -1e9, 2.0**-10, 3 * 2.0**-10],
        [16.0, 20.0, 256.0, 320.0, 448.0, 448.0, -448.0, 0.0, 2 * 2.0**-9],
    ),
}


@pytest.mark.parametrize("name", ROUND_ROWS)
def test_rounding_worked_out_by_hand(name):
    values, want = ROUND_ROWS[name]
    assert get_format(name).round(torch.tensor(values)).tolist() == want


@pytest.mark.parametrize("name", CODED)
def test_rounding_is_to_the_nearest_value(name):
    """Against a search over all values, at random places and at all midpoints."""
    fmt = get_format(name)
    values = fmt.decode(finite_patterns(name)).unique()
    middles = (values[1:] + values[:-1]) / 2
    generator = torch.Generator().manual_seed(0)
    random = (torch.rand(500, generator=generator) * 2.2 - 1.1) * fmt.largest
    x = torch.cat((random, middles, middles.nextafter(middles + 1), middles.nextafter(middles - 1)))
    distance = (fmt.round(x.clone()) - x).abs()
    nearest = (x[:, None] - values).abs().min(dim=1).values
    assert torch.equal(distance, nearest)


def test_e4m3_rounds_like_torch_inside_its_range():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 100
    x = x.clamp(-448, 448)
    assert torch.equal(get_format("e4m3").round(x), x.to(torch.float8_e4m3fn).float())


def test_float16_rounds_and_has_no_codes():
    fmt = get_format("float16")
    assert not fmt.is_quantized
    assert fmt.round(torch.tensor([1.0 + 2.0**-12])).item() == 1.0
    with pytest.raises(RecipeError, match="no code"):
        fmt.encode(torch.zeros(1))


def test_an_unknown_format_is_refused_with_the_known_ones():
    with pytest.raises(
        RecipeError, match=r"'int9'; known: int2 to int8, odd4, e4m3, e2m1, float16"
    ):
        get_format("int9")
