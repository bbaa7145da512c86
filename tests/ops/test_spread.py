"""How launches of few CTAs are spread over a GPU."""

import pytest

from quatom.ops.spread import crowd, padded_bytes

PROCESSOR = 228 * 1024


@pytest.mark.parametrize(
    ("ctas", "each"), [(1, 1), (64, 1), (132, 1), (133, 2), (264, 2), (265, 0), (4096, 0)]
)
def test_ctas_are_spread_evenly_as_long_as_they_are_few(ctas, each):
    assert crowd(ctas, 132, 2) == each


@pytest.mark.parametrize("most", [1, 2, 3, 4])
def test_as_many_ctas_fit_as_are_meant_to_and_no_more(most):
    taken = padded_bytes(9000, most) + 1024  # the system takes a KiB of each
    assert most * taken <= PROCESSOR < (most + 1) * taken


def test_what_a_cta_uses_is_never_cut():
    assert padded_bytes(9000, 0) == 9000
    assert padded_bytes(200_000, 1) == 200_000
    assert padded_bytes(100_000, 2) == 100_000
