"""attention: every backend against float64 over what the cache dequantizes to."""

import math

import pytest
import torch
from attention_batch import DEVICE, TOLERANCE, Batch, assert_close

from quatom.errors import BackendError, ShapeError
from quatom.numerics.kv_pages import HEAD_DIMS
from quatom.ops.attention import AttentionOptions, Sequences, attention
from quatom.ops.attention.cuda import (
    DecodeConfig,
    choose_cut,
    compile_decode,
    decode_costs,
    decode_cuda,
    default_config,
)
from quatom.ops.attention.triton_gather import gather_triton
from quatom.ops.backend import Backend
from quatom.ops.cuda_build import _nvrtc
from quatom.ops.rope_append_kv.reference import rotate_halves

BACKENDS = [Backend.REFERENCE, Backend.TRITON]


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_length_up_to_three_blocks_and_one(backend):
    batch = Batch(list(range(50)))
    assert_close(batch.run(backend), batch.truth(), torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kv", ["int8", "float16", "bfloat16", "float32"])
def test_lengths_around_blocks_in_every_format(backend, kv):
    """How many tokens there are does not depend on the format of one."""
    batch = Batch([0, 1, 2, 15, 16, 17, 32, 33, 49], kv=kv)
    assert_close(batch.run(backend), batch.truth(), torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size"),
    [(4, 4, 64, 16), (6, 2, 96, 32), (8, 1, 128, 64), (3, 3, 256, 48)],
)
def test_decode_of_head_shapes(backend, heads, kv_heads, head_dim, block_size, dtype):
    shape = dict(heads=heads, kv_heads=kv_heads, head_dim=head_dim, block_size=block_size)
    batch = Batch([1, 130, 64], **shape, dtype=dtype)
    assert_close(batch.run(backend), batch.truth(), dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kv", ["int4", "float32"])
def test_prefill_chunks_and_decodes_in_one_batch(backend, kv):
    batch = Batch([1, 40, 33, 70, 0, 5], [1, 1, 33, 20, 0, 3], heads=4, kv_heads=2, kv=kv)
    assert_close(batch.run(backend), batch.truth(), torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_decodes_first_changes_nothing_but_the_route(backend):
    batch = Batch([50, 17, 33, 70], [1, 1, 33, 20])
    assert_close(batch.run(backend, num_decodes=2), batch.truth(), torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("options", "truth"),
    [
        ({"sliding_window": 20}, {"window": 20}),
        ({"logit_softcap": 3.0}, {"softcap": 3.0}),
        ({"softmax_scale": 0.7}, {"scale": 0.7}),
        (
            {"sliding_window": 1, "logit_softcap": 2.0, "softmax_scale": 0.3},
            {"window": 1, "softcap": 2.0, "scale": 0.3},
        ),
        ({"sinks": True}, {"sinks": True}),
        ({"sinks": True, "sliding_window": 20}, {"sinks": True, "window": 20}),
        (
            {"sinks": True, "sliding_window": 9, "logit_softcap": 2.0, "softmax_scale": 0.3},
            {"sinks": True, "window": 9, "softcap": 2.0, "scale": 0.3},
        ),
    ],
)
@pytest.mark.parametrize("new_tokens", [1, 25])
def test_options(backend, options, truth, new_tokens):
    batch = Batch([150, 26], new_tokens, block_size=64)
    assert_close(batch.run(backend, **options), batch.truth(**truth), torch.float32)


@pytest.mark.parametrize(
    ("splits", "sinks"),
    [(1, False), (1, True), (2, True), (7, False), (15, True)],  # the last: more than blocks
)
def test_split_counts_agree(splits, sinks):
    batch = Batch([0, 200])
    options = {"num_splits": splits, "sinks": sinks}
    got = batch.run(Backend.TRITON, **options)
    assert_close(got, batch.truth(sinks=sinks), torch.float32)
    assert torch.equal(got, batch.run(Backend.TRITON, **options))


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_stored_before_rotary_embedding(backend):
    batch = Batch([45, 20], [1, 20])
    angle = torch.outer(torch.arange(64.0), 10000.0 ** -torch.linspace(0, 1, 32))
    cos, sin = angle.cos(), angle.sin()
    got = batch.run(backend, rotary=(cos.to(DEVICE), sin.to(DEVICE)))
    for kv in batch.kv:
        low, high = kv[0].chunk(2, dim=-1)
        c, s = (x[: len(low), None].double() for x in (cos, sin))
        kv[0] = torch.cat((low * c - high * s, high * c + low * s), dim=-1)
    assert_close(got, batch.truth(), torch.float32)


@pytest.mark.parametrize("kv", ["int4", "int8", "bfloat16"])
@pytest.mark.parametrize("rotated", [False, True])
def test_gathered_workspace_holds_what_the_pages_dequantize_to(kv, rotated):
    batch = Batch([45, 0, 33], head_dim=96, kv_heads=2, kv=kv)
    angle = torch.outer(torch.arange(64.0), 10000.0 ** -torch.linspace(0, 1, 48)).to(DEVICE)
    rotary = (angle.cos(), angle.sin())
    starts = torch.tensor([0, 45, 45, 78], dtype=torch.int32, device=DEVICE)
    table = batch.arguments["block_tables"]
    got = gather_triton(
        batch.pages, table, starts, 78, 45, torch.float32, rotary if rotated else None
    )
    k, v = (torch.cat(parts).float() for parts in zip(*batch.kv, strict=True))
    if rotated:
        position = torch.cat([torch.arange(n) for n in batch.lengths])
        k = rotate_halves(k, *(x.cpu()[position] for x in rotary))
    torch.testing.assert_close(got[0].cpu(), k, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1].cpu(), v, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_logits_of_ten_thousand_survive(backend, sign):
    batch = Batch([40, 3], seed=1)
    batch.q *= sign * 1e4 / (batch.q.norm(dim=-1, keepdim=True) * math.sqrt(64)) * 8
    want = batch.truth()
    assert batch.q.abs().max() > 1e3
    assert_close(batch.run(backend), want, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("gain", "shift"), [(1e-3, 0.0), (1.0, 100.0), (0.0, 7.0), (300.0, 0.0)])
def test_small_one_sided_constant_and_large_groups(backend, gain, shift):
    """gain 0 makes every group constant; shift 100 makes V one-sided."""
    batch = Batch([33, 90], gain=gain, shift=shift, dtype=torch.float16)
    if gain == 0.0:
        assert batch.run(backend).abs().max() == 0.0  # gain multiplies the shift too
        batch = Batch([33, 90], gain=1e-7, shift=7e7, dtype=torch.float16)
    assert_close(batch.run(backend), batch.truth(), torch.float16)


@pytest.mark.parametrize("num_decodes", [0, 2])
def test_layers_share_what_the_batch_alone_decides(num_decodes):
    batch = Batch([50, 17, 33, 70, 0], [1, 1, 33, 20, 0], heads=4, kv_heads=2)
    angle = torch.outer(torch.arange(70.0), 10000.0 ** -torch.linspace(0, 1, 32)).to(DEVICE)
    rotary = (angle.cos(), angle.sin())
    options = dict(rotary=rotary, num_decodes=num_decodes, backend=Backend.REFERENCE)
    shared = {}
    assert torch.equal(batch.run(shared=shared, **options), batch.run(**options))
    made = dict(shared)
    batch.q = batch.q.flip(0)  # another layer
    assert torch.equal(batch.run(shared=shared, **options), batch.run(**options))
    assert made
    assert {key: id(plan) for key, plan in shared.items()} == {k: id(p) for k, p in made.items()}


@pytest.mark.parametrize("num_decodes", [0, 2])
def test_layers_with_and_without_a_window_take_turns(num_decodes):
    batch = Batch([50, 17, 33, 70, 0], [1, 1, 33, 20, 0], heads=4, kv_heads=2)
    shared, backend = {}, Backend.REFERENCE
    for window, softcap in ((None, None), (8, None), (None, 2.0), (8, 2.0), (20, None)) * 2:
        options = dict(sliding_window=window, logit_softcap=softcap, num_decodes=num_decodes)
        got = batch.run(backend, shared=shared, **options)
        assert_close(got, batch.truth(window=window, softcap=softcap), torch.float32)


@pytest.mark.parametrize("num_decodes", [0, 2])
def test_layers_of_other_sinks_take_turns(num_decodes):
    batch = Batch([50, 17, 33, 70, 0], [1, 1, 33, 20, 0], heads=4, kv_heads=2)
    shared, options = {}, dict(num_decodes=num_decodes, backend=Backend.REFERENCE)
    for sinks in (False, True, False, True, True):
        batch.sinks = batch.sinks.flip(0) + 1.0  # another layer
        got = batch.run(shared=shared, sinks=sinks, **options)
        assert_close(got, batch.truth(sinks=sinks), torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sink", [-1e4, 60.0, 1e4])
def test_sinks_far_from_all_scores(backend, sink):
    """One that is nothing beside the tokens, and ones beside which they are nothing."""
    batch = Batch([40, 3, 0], dtype=torch.float16)
    batch.sinks = torch.full_like(batch.sinks, sink)
    got = batch.run(backend, sinks=True)
    if sink < 0:
        assert torch.equal(got, batch.run(backend))
    else:
        assert (got == 0).all()  # exp(-50) is below the least float16


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("new_tokens", [1, 40])
def test_sinks_are_those_of_gpt_oss(backend, new_tokens):
    gpt_oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    batch = Batch([40], new_tokens, heads=4, kv_heads=2, head_dim=64, kv="float32")
    module = torch.nn.Module()
    module.sinks, module.num_key_value_groups = batch.sinks.cpu(), 2
    k, v = (x.float().transpose(0, 1)[None] for x in batch.kv[0])
    mask = torch.full((new_tokens, 40), -torch.inf).triu(1 + 40 - new_tokens)
    q = batch.q.cpu().transpose(0, 1)[None]
    want, _ = gpt_oss.eager_attention_forward(module, q, k, v, mask, scaling=0.125)
    assert_close(batch.run(backend, sinks=True), want[0].double(), torch.float32)


@pytest.mark.parametrize("num_decodes", [0, 2])
def test_layers_of_two_rotary_tables_take_turns(num_decodes):
    batch = Batch([50, 17, 33, 70, 0], [1, 1, 33, 20, 0], heads=4, kv_heads=2)
    tables = []
    for base in (10000.0, 50.0):
        angle = torch.outer(torch.arange(70.0), base ** -torch.linspace(0, 1, 32)).to(DEVICE)
        tables.append((angle.cos(), angle.sin()))
    options, shared = dict(num_decodes=num_decodes, backend=Backend.REFERENCE), {}
    want = [batch.run(rotary=rotary, **options) for rotary in (*tables, None)]
    assert not torch.allclose(want[0], want[1])
    for rotary, expected in zip((*tables, None) * 2, want * 2, strict=True):
        assert torch.equal(batch.run(rotary=rotary, shared=shared, **options), expected)


@pytest.mark.parametrize("num_decodes", [0, 2])
def test_layers_whose_caches_differ_take_turns(num_decodes):
    def layer(kv_heads, kv):
        return Batch([50, 17, 33], [1, 1, 33], heads=4, kv_heads=kv_heads, kv=kv)

    layers, shared = [layer(2, "int4"), layer(4, "int4"), layer(2, "float16")], {}
    for batch in layers * 2:
        got = batch.run(Backend.REFERENCE, shared=shared, num_decodes=num_decodes)
        assert_close(got, batch.truth(), torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_padding_row_gets_zeros(backend):
    batch = Batch([0, 20], dtype=torch.float16)
    assert (batch.run(backend)[0] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_prefill_and_token_by_token_decode_see_the_same_values(backend):
    batch = Batch([24], 24)
    at_once = batch.run(backend)
    for i in (0, 11, 23):
        arguments = batch.arguments | dict(
            cu_seqlens_q=torch.tensor([0, 1], dtype=torch.int32, device=DEVICE),
            seq_lens=torch.tensor([i + 1], dtype=torch.int32, device=DEVICE),
            max_seqlen_q=1,
        )
        alone = attention(batch.q[i : i + 1], batch.pages, **arguments, backend=backend)
        torch.testing.assert_close(alone[0], at_once[i], rtol=1e-5, atol=1e-5)


def test_errors_name_what_does_not_fit():
    batch = Batch([20, 5], heads=4, kv_heads=2)
    with pytest.raises(ShapeError, match=r"\(2, 3, 64\).*multiple of the cache's 2 KV heads"):
        attention(batch.q[:, :3], batch.pages, **batch.arguments)
    with pytest.raises(ShapeError, match="2 sequences need 2 block tables and 3 prefix sums"):
        attention(batch.q, batch.pages, **batch.arguments | {"cu_seqlens_q": torch.zeros(2).int()})
    lens = batch.arguments["seq_lens"].long()
    with pytest.raises(ShapeError, match=r"seq_lens must be int32, got torch.int64"):
        attention(batch.q, batch.pages, **batch.arguments | {"seq_lens": lens})
    with pytest.raises(ShapeError, match=r"sinks \(4,\) torch.float64 must be \(4,\) float32"):
        attention(batch.q, batch.pages, **batch.arguments, sinks=batch.sinks.double())
    with pytest.raises(ShapeError, match=r"sinks \(3,\).*one logit per query head"):
        attention(batch.q, batch.pages, **batch.arguments, sinks=batch.sinks[:3])
    with pytest.raises(BackendError, match=r"cannot run on backend cuda: .*float32|are on cpu"):
        batch.run(Backend.CUDA)


def decode_cuda_error(dtype=torch.float16, options=None, truth=None, **shape):
    """One decode on the CUDA backend, against float64."""
    batch = Batch(**shape, dtype=dtype)
    got = batch.run(Backend.CUDA, **(options or {}))
    assert_close(got, batch.truth(**(truth or {})), dtype)
    assert torch.equal(got, batch.run(Backend.CUDA, **(options or {})))
    torch.cuda.synchronize()  # no kernel still writes what a settled call reads early
    assert torch.equal(got, batch.run(Backend.CUDA, **(options or {}), settled=True))


@pytest.mark.gpu
@pytest.mark.parametrize("block_size", [16, 32, 48, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cuda_decode_of_every_length(block_size, dtype):
    lengths = list(range(3 * block_size + 2))
    decode_cuda_error(dtype, lengths=lengths, heads=4, block_size=block_size, head_dim=128)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (8, 1), (12, 1), (40, 2)])
@pytest.mark.parametrize(("new_tokens", "block_size"), [(1, 64), (1, 16), (3, 32), (4, 64)])
def test_cuda_decode_of_head_shapes(head_dim, heads, kv_heads, new_tokens, block_size):
    decode_cuda_error(
        lengths=[5, 700, 4, 129, 64],
        new_tokens=new_tokens,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=block_size,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("splits", [1, 2, 3, 7, 16, 33, 64])
def test_cuda_split_counts_agree(splits, sinks):
    shape = dict(lengths=[0, 1, 3000, 131], heads=8, kv_heads=2, head_dim=128, block_size=32)
    options, truth = {"num_splits": splits, "sinks": sinks}, {"sinks": sinks}
    decode_cuda_error(options=options, truth=truth, **shape)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [d for d in HEAD_DIMS if d % 16 == 0])
@pytest.mark.parametrize("new_tokens", [1, 4])
@pytest.mark.parametrize("splits", [1, 5])
def test_cuda_decode_with_sinks(dtype, head_dim, new_tokens, splits):
    shape = dict(lengths=[5, 700, 4, 129, 64], heads=16, kv_heads=2, block_size=16)
    decode_cuda_error(
        dtype,
        {"num_splits": splits, "sinks": True, "sliding_window": 128},
        {"sinks": True, "window": 128},
        new_tokens=new_tokens,
        head_dim=head_dim,
        **shape,
    )


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("options", "truth"),
    [
        ({"sliding_window": 100}, {"window": 100}),
        ({"logit_softcap": 3.0}, {"softcap": 3.0}),
        (
            {"sliding_window": 1, "logit_softcap": 2.0, "softmax_scale": 0.3},
            {"window": 1, "softcap": 2.0, "scale": 0.3},
        ),
    ],
)
@pytest.mark.parametrize(("new_tokens", "block_size"), [(1, 64), (1, 16), (4, 64), (4, 32)])
def test_cuda_decode_options(options, truth, new_tokens, block_size):
    shape = dict(heads=8, kv_heads=2, head_dim=128, block_size=block_size)
    shape["lengths"] = [700, 26, 100, 101]
    decode_cuda_error(options=options, truth=truth, new_tokens=new_tokens, **shape)


@pytest.mark.gpu
@pytest.mark.parametrize(("gain", "shift"), [(1e-3, 0.0), (1.0, 100.0), (1e-7, 7e7), (300.0, 0.0)])
def test_cuda_small_one_sided_constant_and_large_groups(gain, shift):
    decode_cuda_error(lengths=[33, 90, 1000], gain=gain, shift=shift, head_dim=128)


@pytest.mark.gpu
@pytest.mark.parametrize("factor", [1e4, -1e4, 1e-6])
def test_cuda_decode_of_extreme_queries(factor):
    batch = Batch([40, 3, 500], head_dim=128, dtype=torch.bfloat16)
    batch.q *= factor / batch.q.norm(dim=-1, keepdim=True)
    assert_close(batch.run(Backend.CUDA), batch.truth(), torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [d for d in HEAD_DIMS if d % 16 == 0])
@pytest.mark.parametrize("block_size", [16, 48, 64])
@pytest.mark.parametrize(
    ("warps", "tile", "stages", "bulk"), [(4, 32, 2, False), (2, 64, 3, True), (8, 32, 3, True)]
)
def test_cuda_variants_agree(head_dim, block_size, warps, tile, stages, bulk):
    """Other copies (what sm_80 runs) and other tiles than the default."""
    if bulk and head_dim % 32:
        pytest.skip("bulk copies take whole rows of 16 bytes")
    batch = Batch(
        [0, 1, 700, 131, 64],
        heads=8,
        kv_heads=2,
        head_dim=head_dim,
        block_size=block_size,
        dtype=torch.float16,
    )
    out = torch.full_like(batch.q, torch.nan)
    config = DecodeConfig(warps=warps, tile=tile, stages=stages, min_ctas=1, bulk=bulk)
    options = AttentionOptions(head_dim**-0.5, num_splits=3)
    decode_cuda(batch.q, out, batch.pages, Sequences(**batch.arguments), options, config)
    assert_close(out, batch.truth(), torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kv", ["int4", "int8", "bfloat16"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (50, None), (None, 3.0), (50, 3.0)])
@pytest.mark.parametrize("sinks", [False, True])
def test_cuda_prefill(dtype, kv, head_dim, window, softcap, sinks):
    lengths, new_tokens = [1, 400, 133, 70, 5], [1, 1, 133, 20, 5]
    batch = Batch(
        lengths,
        new_tokens,
        heads=4,
        kv_heads=2,
        head_dim=head_dim,
        kv=kv,
        dtype=dtype,
    )
    for num_decodes in (0, 2):
        # The workspace rounds K and V to the query's dtype; scores carry that rounding too.
        if num_decodes and (kv != "int4" or head_dim % 16):
            continue
        options = {"sliding_window": window, "logit_softcap": softcap, "num_decodes": num_decodes}
        options["sinks"] = sinks
        got = batch.run(Backend.CUDA, **options).double().cpu()
        sums = tuple(
            torch.tensor([0, *counts[num_decodes:]]).cumsum(0).int().cuda()
            for counts in (new_tokens, lengths)
        )
        given = batch.run(Backend.CUDA, **options, prefill_cu_seqlens=sums)
        assert torch.equal(given.double().cpu(), got)
        want = batch.truth(window=window, softcap=softcap, sinks=sinks)
        assert (got - want).norm() / want.norm() <= 2 * TOLERANCE[dtype]


def test_splits_fill_the_device_and_stop_at_256_tokens():
    assert choose_cut(8, 32768, 132) == (4, 33)  # 264 CTAs: two for each of 132 processors
    assert choose_cut(2048, 1024, 132) == (4, 1)  # enough CTAs already
    assert choose_cut(8, 1024, 132) == (4, 4)
    assert choose_cut(1, 10, 132) == (4, 1)
    for gpu in ("NVIDIA H100 80GB HBM3", "NVIDIA H200"):
        costs = decode_costs(gpu, 128, 1)
        assert all(1 <= choose_cut(n, 131072, 132, costs)[1] <= 64 for n in range(1, 600, 7))


@pytest.mark.parametrize(
    ("ctas", "length", "measured"),
    [
        (8, 1024, {(4, 2): 7.9, (4, 3): 6.9, (4, 4): 6.4, (4, 8): 5.9, (16, 2): 7.4}),
        (8, 32768, {(4, 16): 21.4, (4, 32): 17.4, (4, 33): 17.5, (4, 48): 18.8, (4, 64): 19.1}),
        (64, 32768, {(4, 4): 96.5, (4, 6): 84.9, (4, 8): 79.2, (4, 10): 93.8, (4, 16): 81.0}),
        (128, 1024, {(4, 1): 11.8, (4, 2): 13.6, (4, 4): 14.3, (8, 1): 10.5, (8, 2): 13.8}),
        (128, 4096, {(4, 1): 34.8, (4, 2): 32.5, (4, 3): 28.9, (4, 4): 27.2, (8, 1): 25.5}),
        (512, 1024, {(4, 1): 25.0, (4, 2): 30.8, (4, 4): 36.6, (8, 1): 29.5}),
        (512, 4096, {(4, 1): 77.2, (4, 2): 80.9, (4, 4): 84.1, (8, 1): 77.1}),
    ],
)
def test_the_cut_on_an_h200_is_the_fastest_measured(ctas, length, measured):
    """Microseconds of heads of 128 channels; docs/lab/kernels-attention.md."""
    cut = choose_cut(ctas, length, 132, decode_costs("NVIDIA H200", 128, 1))
    assert measured[cut] <= 1.01 * min(measured.values())  # two runs differ by 1 %


def test_a_cta_that_has_a_processor_for_itself_fetches_more_tiles():
    costs = decode_costs("NVIDIA H200", 128, 1)
    assert [costs.stages(ctas, 132) for ctas in (1, 132, 133)] == [4, 4, 2]
    assert decode_costs("NVIDIA H100 PCIe", 128, 1).stages(1, 132) == 2
    # Four warps or eight: all stages fit.
    for warps in (4, 8):
        config = default_config(128, 1, (9, 0), warps, stages=4)
        assert config.shared_bytes(128, 1) <= 227 * 1024


def test_what_was_not_measured_on_an_h200_keeps_its_cut():
    assert decode_costs("NVIDIA H200", 128, 2) == decode_costs("NVIDIA H100 PCIe", 128, 1)
    assert decode_costs("NVIDIA H200", 64, 1) == decode_costs("NVIDIA GH200 480GB", 128, 1)
    # 4 new tokens of 16 sequences: 36.1 us with 2 splits, 41.7 with 4.
    assert choose_cut(128, 4096, 132, decode_costs("NVIDIA H200", 128, 2)) == (4, 2)


def test_short_rows_come_in_larger_tiles():
    assert default_config(64, 1, (9, 0)).tile == 64
    assert {default_config(64, 2, (9, 0)).tile, default_config(64, 1, (8, 9)).tile} == {32}
    assert default_config(128, 1, (9, 0), 8).min_ctas == 2  # as many warps as four CTAs of four


def test_cuda_source_compiles_for_what_nobody_has_measured(tmp_path, monkeypatch):
    """test_cuda_build looks at what sm_80 and sm_90 get."""
    try:
        _nvrtc()
    except BackendError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("QUATOM_CACHE_DIR", str(tmp_path))
    config = DecodeConfig(warps=4, tile=32, stages=2, min_ctas=4, bulk=True)
    options = {"bf16": True, "softcap": True, "window": True, "sinks": True}
    cubin = compile_decode("sm_120", config, 128, 16, 1, **options)
    assert cubin.startswith(b"\x7fELF")


@pytest.mark.gpu
def test_cuda_prefill_rotates_keys_stored_before_rotary_embedding():
    batch = Batch([200, 90], [64, 90], heads=4, kv_heads=2, head_dim=128, dtype=torch.float16)
    angle = torch.outer(torch.arange(256.0), 10000.0 ** -torch.linspace(0, 1, 64)).cuda()
    rotary = (angle.cos(), angle.sin())
    got = batch.run(Backend.CUDA, rotary=rotary).float()
    want = batch.run(Backend.REFERENCE, rotary=rotary).float()
    assert (got - want).norm() / want.norm() <= 2 * TOLERANCE[torch.float16]
