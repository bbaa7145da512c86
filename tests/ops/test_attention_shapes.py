"""attention with every option at once, over every head size and cache format."""

from itertools import product

import pytest
import torch
from attention_batch import DEVICE, TOLERANCE, Batch, assert_close
from tests.covering import covering

from quatom.errors import BackendError
from quatom.numerics.kv_pages import HEAD_DIMS
from quatom.ops.attention import AttentionOptions, Sequences, attention, flash, seen_tokens
from quatom.ops.attention.triton_gather import gather_triton
from quatom.ops.backend import Backend

WINDOWS, SOFTCAPS, SCALES, SINKS = (None, 7, 40), (None, 3.0), (None, 0.3), (False, True)
HEADS, FORMATS = ((2, 2), (6, 2), (8, 1)), ("int4", "int8", "float16", "bfloat16", "float32")
NEW_TOKENS = (1, 3, 30)  # decode, a few drafted tokens, a chunk of a prompt
AXES = (WINDOWS, SOFTCAPS, SCALES, SINKS, HEADS, FORMATS, NEW_TOKENS, HEAD_DIMS)
GRID = list(product(*AXES))


def every(stride):
    """Points of the grid that a stride without a common factor spreads over all of its axes."""
    points = GRID[::stride]
    for axis, values in enumerate(AXES):
        assert {point[axis] for point in points} == set(values)
    return points


def make(point, lengths=(90, 33), dtype=torch.float32):
    window, softcap, scale, sinks, (heads, kv_heads), kv, new_tokens, head_dim = point
    batch = Batch(
        lengths,
        new_tokens,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        kv=kv,
        dtype=dtype,
        seed=head_dim,
    )
    options = {"sliding_window": window, "logit_softcap": softcap, "softmax_scale": scale}
    options["sinks"] = sinks
    return batch, options, batch.truth(window=window, softcap=softcap, scale=scale, sinks=sinks)


def name(point):
    return "-".join(map(str, point))


@pytest.mark.parametrize("point", every(107), ids=name)
def test_the_reference(point):
    batch, options, truth = make(point)
    assert_close(batch.run(Backend.REFERENCE, **options), truth, torch.float32)


@pytest.mark.parametrize("point", every(387), ids=name)
def test_the_triton_kernel(point):
    batch, options, truth = make(point)
    assert_close(batch.run(Backend.TRITON, **options), truth, torch.float32)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_triton_kernel_multiplies_codes_of_any_head_size(head_dim):
    """16-bit queries take another way through the kernel: codes are not converted."""
    point = (40, 3.0, 0.3, True, (6, 2), "int4", 3, head_dim)
    batch, options, truth = make(point, dtype=torch.float16)
    assert_close(batch.run(Backend.TRITON, **options), truth, torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("point", every(133), ids=name)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_a_gpu_runs(point, dtype):
    batch, options, truth = make(point, lengths=(700, 33, 260), dtype=dtype)
    got = batch.run(**options)
    error = (got.double().cpu() - truth).norm() / truth.norm()
    # A prefill rounds K and V to the query's dtype; scores carry that rounding too.
    assert error <= 2 * TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [d for d in HEAD_DIMS if d % 16 == 0])
@pytest.mark.parametrize("options", [{}, {"window": 100, "softcap": 3.0, "scale": 0.2}])
@pytest.mark.parametrize("block_size", [16, 64])
def test_cuda_decode_of_every_head_size(head_dim, options, block_size):
    for new_tokens, (heads, kv_heads) in product((1, 4), ((4, 4), (12, 1))):
        batch = Batch(
            [5, 700, 4, 129, 64],
            new_tokens,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            block_size=block_size,
            dtype=torch.float16,
        )
        got = batch.run(
            Backend.CUDA,
            sliding_window=options.get("window"),
            logit_softcap=options.get("softcap"),
            softmax_scale=options.get("scale"),
        )
        assert_close(got, batch.truth(**options), torch.float16)


SINKS = torch.tensor([3.0, -1.0, 0.0, 0.5], device=DEVICE)
ALL_OPTIONS = {"sliding_window": 9, "logit_softcap": 2.0, "softmax_scale": 0.4}


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        (Backend.REFERENCE, {}),
        (Backend.REFERENCE, {"sliding_window": 9}),
        (Backend.REFERENCE, ALL_OPTIONS),
        (Backend.TRITON, ALL_OPTIONS),
        (Backend.REFERENCE, {"sliding_window": 9, "sinks": SINKS}),
        (Backend.TRITON, {"sliding_window": 9, "sinks": SINKS}),
    ],
)
def test_at_once_in_chunks_and_one_by_one_agree(backend, options):
    batch = Batch([50], 50, heads=4, kv_heads=2, head_dim=80)
    at_once = attention(batch.q, batch.pages, **batch.arguments, **options, backend=backend)
    for chunk in (1, 4, 23):
        for first in range(0, 50, {1: 7, 4: 12}.get(chunk, chunk)):
            rows = batch.q[first : first + chunk]
            arguments = batch.arguments | dict(
                cu_seqlens_q=torch.tensor([0, len(rows)], dtype=torch.int32, device=DEVICE),
                seq_lens=torch.tensor([first + len(rows)], dtype=torch.int32, device=DEVICE),
                max_seqlen_q=len(rows),
            )
            got = attention(rows, batch.pages, **arguments, **options, backend=backend)
            torch.testing.assert_close(got, at_once[first : first + chunk], rtol=1e-5, atol=1e-5)


def poison_before(batch, window):
    """Fill every block that lies before the windows of all new tokens with NaN."""
    size = batch.pages.block_size
    for b, (length, new) in enumerate(zip(batch.lengths, batch.new, strict=True)):
        first = max(length - new + 1 - window, 0)  # what the first new token sees
        table = batch.arguments["block_tables"][b, : first // size].long()
        batch.pages.storage[table] = 0xFF


@pytest.mark.parametrize(
    "backend", [Backend.TRITON, pytest.param(Backend.CUDA, marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize(
    ("new_tokens", "block_size", "window"),
    [
        (1, 16, 1),
        (1, 48, 20),
        (1, 64, 100),
        (4, 16, 100),
        (4, 48, 1),
        ([1, 30, 5], 16, 20),
        ([1, 30, 5], 64, 1),
        ([1, 30, 5], 48, 100),
    ],
)
def test_no_block_before_the_window_is_read(backend, new_tokens, block_size, window):
    dtype = torch.float16 if backend is Backend.CUDA else torch.float32
    batch = Batch([300, 130, 90], new_tokens, block_size=block_size, dtype=dtype)
    truth = batch.truth(window=window)
    poison_before(batch, window)
    got = batch.run(backend, sliding_window=window)
    error = (got.double().cpu() - truth).norm() / truth.norm()
    assert error <= 2 * TOLERANCE[dtype]


@pytest.mark.parametrize(("window", "most"), [(None, 300), (1000, 300), (100, 102), (1, 3)])
def test_a_window_bounds_what_splits_are_cut_from(window, most):
    none = torch.empty(0)
    batch = Sequences(none, none, none, max_seqlen_q=3, max_seq_len=300)
    assert seen_tokens(batch, AttentionOptions(1.0, window)) == most


@pytest.mark.parametrize("kv", ["int4", "float16"])
@pytest.mark.parametrize("head_dim", [64, 100])
def test_the_last_tokens_of_each_sequence_are_gathered_into_padded_rows(kv, head_dim):
    batch = Batch([45, 0, 33], head_dim=head_dim, kv_heads=2, kv=kv)
    starts = torch.tensor([0, 20, 20, 53], dtype=torch.int32, device=DEVICE)
    got = gather_triton(
        batch.pages,
        batch.arguments["block_tables"],
        starts,
        60,
        33,
        torch.float32,
        seq_lens=batch.arguments["seq_lens"],
        padding=4,
    )
    for x, whole in zip(got, zip(*batch.kv, strict=True), strict=True):
        want = torch.cat((whole[0][25:], whole[2])).float()
        assert x.shape == (60, 2, head_dim + 4)
        torch.testing.assert_close(x[:53, :, :head_dim].cpu(), want, rtol=1e-6, atol=1e-6)
        assert (x[:53, :, head_dim:] == 0).all()


def dense_flash(q, k, v, cu_q, cu_k, most_q, most_k, _, causal, __, *, scale, **window):
    """What torch's FlashAttention computes of packed sequences, aligned to their last tokens."""
    assert causal
    assert q.shape[2] % 8 == 0
    left, right = window["window_size_left"], window["window_size_right"]
    assert right in (None, 0)
    out = torch.zeros_like(q)
    log_sums = torch.full((q.shape[1], q.shape[0]), torch.inf)  # as of rows that see nothing
    group = q.shape[1] // k.shape[1]
    for b in range(len(cu_q) - 1):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        n, length = rows.stop - rows.start, keys.stop - keys.start
        assert n <= most_q
        assert length <= most_k
        scores = torch.einsum("ihd,jhd->hij", q[rows], k[keys].repeat_interleave(group, 1)) * scale
        distance = torch.arange(length - n, length)[:, None] - torch.arange(length)
        seen = (distance >= 0) & (distance <= (length if left is None else left))
        scores = scores.masked_fill(~seen, -torch.inf)
        log_sums[:, rows] = scores.logsumexp(-1)
        weights = scores.softmax(-1).nan_to_num(0.0)
        out[rows] = torch.einsum("hij,jhd->ihd", weights, v[keys].repeat_interleave(group, 1))
    return out, log_sums, None, None, None


def prefill(batch, options, monkeypatch):
    """As on a GPU before Hopper, where FlashAttention is used but for a soft-cap."""
    monkeypatch.setattr(flash, "device_capability", lambda _: (8, 0))
    out = torch.full(batch.q.shape, torch.nan)
    flash.prefill_cuda(batch.q, out, batch.pages, Sequences(**batch.arguments), options)
    return out


@pytest.mark.skipif(DEVICE == "cuda", reason="a stand-in for torch's kernel on the CPU")
# The soft-cap and the total choose the path; the head size, the window and sinks are in each.
@pytest.mark.parametrize(
    ("path", "window", "head_dim", "sinks"),
    covering(
        [(None, False), (None, True), (3.0, True)], (None, 1, 20, 500), (64, 100), (False, True)
    ),
)
def test_prefill_over_a_workspace(path, window, head_dim, sinks, monkeypatch):
    softcap, knows_total = path

    class Aten:
        _flash_attention_forward = staticmethod(dense_flash)

    monkeypatch.setattr(flash.torch.ops, "aten", Aten)
    lengths = [70, 40, 33, 50, 0]
    batch = Batch(lengths, [1, 40, 20, 5, 0], heads=2, head_dim=head_dim)
    total = sum(lengths) if knows_total else None
    options = AttentionOptions(
        0.2, window, softcap, total_kv_tokens=total, sinks=batch.sinks if sinks else None
    )
    got = prefill(batch, options, monkeypatch)
    truth = batch.truth(window=window, softcap=softcap, scale=0.2, sinks=sinks)
    assert_close(got, truth, torch.float32)


@pytest.mark.skipif(DEVICE == "cuda", reason="a stand-in for torch's kernel on the CPU")
def test_sinks_need_log_sums_of_packed_sequences(monkeypatch):
    def padded(*arguments, **options):
        out, log_sums, *rest = dense_flash(*arguments, **options)
        return out, log_sums[None], *rest

    class Aten:
        _flash_attention_forward = staticmethod(padded)

    monkeypatch.setattr(flash.torch.ops, "aten", Aten)
    batch = Batch([40], 40)
    options = AttentionOptions(0.2, total_kv_tokens=40, sinks=batch.sinks)
    with pytest.raises(BackendError, match=r"\(1, 2, 40\) of packed .* need \(2, 40\): use back"):
        prefill(batch, options, monkeypatch)
