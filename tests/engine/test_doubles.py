"""The hash model's arithmetic, which all tests of scheduling rest on."""

import random
from itertools import accumulate

import pytest

from tests.engine.doubles import hash_prefixes, mix


@pytest.mark.parametrize("count", [0, 1, 2, 1023, 1024, 3000])
def test_hashes_at_once_are_those_one_after_another(count):
    values = random.Random(count).choices([-7, 0, 299, 2**31 - 2], k=count)
    assert hash_prefixes(values).tolist() == list(accumulate(values, mix, initial=1))[1:]
