"""What an error of a key does to attention's output: against derivatives, and by the statistics."""

from dataclasses import replace

import pytest
import torch

from quatom.families.spec import Attention
from quatom.numerics.rotary import rotary_table
from quatom.ops.rope_append_kv.reference import rotate_halves
from quatom.quantize import key_sensitivity
from quatom.quantize.key_sensitivity import KeySensitivity, score_sensitivity
from quatom.quantize.transforms.keys import balance_keys, offset_keys
from quatom.recipe import KVSpec, PostRopeKeys
from tests.quantize.simulation import hadamard
from tests.quantize.test_keys import KEYS, layer_of, measured, qwen_dir  # noqa: F401

HADAMARD = hadamard(64).double()
PLAIN = Attention(num_heads=4, num_kv_heads=2, head_dim=8, scale=0.3)
KINDS = {
    "plain": PLAIN,
    "window": replace(PLAIN, window=3),
    "soft-cap": replace(PLAIN, logit_softcap=2.0),
    "sinks": replace(PLAIN, sinks=True),
}
SINK = 0.7


def heads(length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, n, 8, generator=generator) for n in (4, 2, 2)]


def attend(products, v, attention):
    """Output (L, D) of one head from the products q . k, in float64."""
    scores = products * attention.scale
    if attention.logit_softcap is not None:
        scores = torch.tanh(scores / attention.logit_softcap) * attention.logit_softcap
    length = len(v)
    hidden = torch.ones(length, length).triu(1).bool()
    if attention.window is not None:
        hidden |= torch.ones(length, length).tril(-attention.window).bool()
    scores = scores.masked_fill(hidden, -torch.inf)
    if not attention.sinks:
        return scores.softmax(-1) @ v
    beside = torch.cat((scores, torch.full((length, 1), SINK, dtype=scores.dtype)), dim=1)
    return beside.softmax(-1)[:, :-1] @ v


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_squared_derivatives_of_the_output(kind):
    attention = KINDS[kind]
    q, k, v = (x[:, 0].double() for x in heads(7))
    jacobian = torch.autograd.functional.jacobian(lambda p: attend(p, v, attention), q @ k.t())
    # (L, D, L, L): only a query's own products move its output.
    own = jacobian.diagonal(dim1=0, dim2=2).square().sum(dim=0)  # (L, L) transposed
    want = own.t() / attention.scale**2
    sinks = torch.tensor([SINK]) if attention.sinks else None
    got = score_sensitivity(q[None].float(), k.float(), v.float(), attention, sinks)[0]
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sinks", [None, torch.tensor([3.0, -1.0, 0.0, 1.0])])
def test_statistics_are_weighted_means_over_all_queries(sinks, monkeypatch):
    monkeypatch.setattr(key_sensitivity, "SEQUENCES", 2)
    rotary = rotary_table(None, 8, 16, max_length=16)
    statistics = KeySensitivity(PLAIN, 5, rotary, sinks)
    sequences = [heads(5, seed) for seed in range(3)]
    statistics.add(*(torch.cat(x) for x in zip(*sequences[:1], strict=True)))
    statistics.add(*(torch.cat(x) for x in zip(*sequences[1:], strict=True)))
    found = statistics.finish()
    for head in range(2):
        total, mean, keys, queries = 0.0, 0.0, 0.0, 0.0
        for q, k, v in sequences[:2]:  # the third is beyond the bound
            for own in (2 * head, 2 * head + 1):
                sink = None if sinks is None else sinks[own : own + 1]
                w = score_sensitivity(q[:, own][None], k[:, head], v[:, head], PLAIN, sink)[0]
                total += w.sum()
                for i in range(5):
                    for t in range(i + 1):
                        mean += w[i, t] * k[t, head]
                        keys += w[i, t] * k[t, head] ** 2
                        queries += w[i, t] * q[i, own] ** 2
        close = {"rtol": 1e-4, "atol": 1e-6}
        torch.testing.assert_close(found["weighted_key_mean"][head], mean / total, **close)
        for name, squares in (("key", keys), ("query", queries)):
            pairs = (squares / total).view(2, 4).sum(dim=0)
            torch.testing.assert_close(found[f"weighted_{name}_squares"][head], pairs, **close)


@pytest.fixture(scope="module")
def weighed(measured):  # noqa: F811
    """The layer of `test_keys`, with weighted statistics of random values."""
    source, weights, _, rotary, statistics, q, k = measured
    attention = layer_of(source).spec.attention
    sensitivity = KeySensitivity(attention, 24, rotary.of(0))
    v = torch.randn(k.shape, generator=torch.Generator().manual_seed(3))
    sensitivity.add(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))
    return source, weights, rotary, statistics | sensitivity.finish(), q, k, v


def quantized_loss(weighed, spec):
    """Squared error of attention's output where K, as the recipe arranges it, is INT4."""
    source, weights, rotary, statistics, q, k, v = weighed
    recipe = replace(layer_of(source), kv_cache=spec)
    arranged = offset_keys(recipe, weights, statistics) if spec.key_offset != "none" else weights
    if spec.key_scaling != "none":
        arranged = balance_keys(recipe, arranged, statistics)
    attention = recipe.spec.attention
    first = attention.q_size
    rows = arranged.sites["qkv"].weight / weights.sites["qkv"].weight
    factor_q = rows[:first, 0].view(-1, 1, 64).double()
    factor_k = rows[first : first + 128, 0].view(2, 1, 64).double()
    loss = 0.0
    for sequence in range(3):
        turned = [
            rotate_halves(x[sequence], *rotary.of(0)).transpose(0, 1).double() for x in (q, k)
        ]
        queries, keys = turned[0] * factor_q, turned[1] * factor_k
        if arranged.key_offset is not None:
            keys = keys - arranged.key_offset.double()[:, None]
        queries, keys = queries @ HADAMARD, keys @ HADAMARD  # as the recipes have it
        low = keys.amin(-1, keepdim=True)
        step = (keys.amax(-1, keepdim=True) - low) / 15
        rounded = ((keys - low) / step).round() * step + low
        for h in range(4):
            value = v[sequence, :, h // 2].double()
            outs = [attend(queries[h] @ x[h // 2].t(), value, attention) for x in (keys, rounded)]
            loss += (outs[0] - outs[1]).square().sum()
    return float(loss)


def test_weighted_statistics_lose_less_of_the_output(weighed):
    plain = quantized_loss(weighed, KEYS)
    spec = replace(KEYS, keys=PostRopeKeys(offset="weighted"), key_scaling="weighted")
    assert quantized_loss(weighed, spec) < plain
    # Factors are those of the formula, unrounded.
    source, weights, _, statistics, *_ = weighed
    layer = replace(layer_of(source), kv_cache=spec)
    moved = balance_keys(layer, offset_keys(layer, weights, statistics), statistics)
    first = layer.spec.attention.q_size
    ratio = moved.sites["qkv"].weight[:first, 0] / weights.sites["qkv"].weight[:first, 0]
    mean = statistics["weighted_key_mean"]
    spread = statistics["weighted_key_squares"] - mean.square().view(2, 2, 32).sum(dim=1)
    want = (spread / statistics["weighted_query_squares"]).pow(0.25)
    got = ratio.view(4, 2, 32)[::2, 0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=0)


def test_an_offset_that_is_not_the_weighted_mean_counts_in_the_balance(weighed):
    source, weights, _, statistics, *_ = weighed
    spec = KVSpec(keys=PostRopeKeys(offset="mean"), key_scaling="weighted")
    layer = replace(layer_of(source), kv_cache=spec)
    moved = balance_keys(layer, offset_keys(layer, weights, statistics), statistics)
    first = layer.spec.attention.q_size
    ratio = moved.sites["qkv"].weight[:first, 0] / weights.sites["qkv"].weight[:first, 0]
    offset, mean = statistics["key_mean"], statistics["weighted_key_mean"]
    second = statistics["weighted_key_squares"]
    pairs = (offset.square() - 2 * offset * mean).view(2, 2, 32).sum(dim=1)
    want = ((second + pairs) / statistics["weighted_query_squares"]).pow(0.25)
    torch.testing.assert_close(ratio.view(4, 2, 32)[::2, 0], want, rtol=1e-3, atol=0)
