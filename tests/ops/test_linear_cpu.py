"""The trial that a shape must pass before oneDNN multiplies it on a CPU."""

import pytest
import torch

from quatom.ops.linear import cpu


@pytest.fixture
def library(monkeypatch):
    """A stand-in for oneDNN: exact sums, to which each test does what it wants."""
    packed = {}

    def pack(weights, scales):
        packed["weights"] = weights
        return weights

    def exact(pixels, tensors):
        codes = pixels.float() - cpu.ZERO_POINT
        return torch.einsum("tsw,snw->tsn", codes, packed["weights"].float())

    monkeypatch.setattr(cpu, "_pack", pack)
    monkeypatch.setattr(cpu, "_group_sums", exact)
    cpu.multiplies_exactly.cache_clear()
    yield exact
    cpu.multiplies_exactly.cache_clear()


def test_exact_sums_pass(library):
    assert cpu.multiplies_exactly(64, 3, 96, 1)


@pytest.mark.parametrize("tokens", cpu._TRIED_TOKENS)
def test_one_wrong_sum_at_one_number_of_tokens_fails(library, tokens, monkeypatch):
    def wrong(pixels, tensors):
        sums = library(pixels, tensors)
        if len(pixels) == tokens:
            sums[-1, -1, -1] += 1.0
        return sums

    monkeypatch.setattr(cpu, "_group_sums", wrong)
    assert not cpu.multiplies_exactly(64, 3, 96, 1)


def test_a_shape_without_a_kernel_fails(library, monkeypatch):
    def refuse(weights, scales):
        raise RuntimeError("could not create a primitive descriptor")

    monkeypatch.setattr(cpu, "_pack", refuse)
    assert not cpu.multiplies_exactly(64, 3, 96, 1)
