"""rope_append_kv: each kernel against the reference, the reference against its properties."""

import itertools

import pytest
import torch

from quatom.errors import BackendError, ShapeError
from quatom.families.spec import Norm
from quatom.numerics.kv_codes import unpack_halves
from quatom.numerics.kv_pages import HEAD_DIMS, KVPages
from quatom.ops.backend import Backend
from quatom.ops.head_norm import HeadNorms, head_norm
from quatom.ops.rope_append_kv import rope_append_kv

KERNELS = [Backend.TRITON]
BACKENDS = [
    Backend.REFERENCE,
    Backend.TRITON,
    pytest.param(Backend.CUDA, marks=pytest.mark.gpu),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_inputs(
    tokens, heads=4, kv_heads=2, head_dim=64, *, dtype=torch.float32, seed=0, device=DEVICE
):
    """q, k, v as strided views of one fused projection, with tables and scattered slots."""
    rng = torch.Generator().manual_seed(seed)
    fused = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim, generator=rng)
    fused = fused.to(device, dtype).unflatten(-1, (-1, head_dim))
    q, k, v = fused.split((heads, kv_heads, kv_heads), dim=1)
    angle = torch.outer(torch.arange(500.0), 10000.0 ** -torch.linspace(0, 1, head_dim // 2))
    positions = torch.randint(0, 500, (tokens,), generator=rng)
    slots = torch.randperm(96, generator=rng)[:tokens]
    return [x.to(device) for x in (q, k, v, angle.cos(), angle.sin(), positions, slots)]


def make_pages(dtype, kv_heads=2, head_dim=64, block_size=16, device=DEVICE):
    pages = KVPages.allocate(96 // block_size, block_size, kv_heads, head_dim, dtype, device)
    pages.storage.fill_(0xA5)
    return pages


def assert_codes_agree(got, want):
    """The tolerance of the contract: one code, on at most one value in a thousand."""
    if want.bits == 4:
        ours = [unpack_halves(rows) for rows in (got.keys, got.values)]
        theirs = [unpack_halves(rows) for rows in (want.keys, want.values)]
    else:
        ours, theirs = [got.keys, got.values], [want.keys, want.values]
    for a, b in zip(ours, theirs, strict=True):
        if not want.quantized:
            torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-6, equal_nan=True)
            continue
        difference = (a.int() - b.int()).abs()
        assert difference.max() <= 1
        assert (difference != 0).float().mean() <= 1e-3
    if want.quantized:
        for a, b in ((got.key_pairs, want.key_pairs), (got.value_pairs, want.value_pairs)):
            torch.testing.assert_close(a, b, rtol=2**-9, atol=1e-3)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", ["int4", "int8", "float16", "bfloat16", "float32"])
@pytest.mark.parametrize("options", [{}, {"rotate_keys_in_cache": False}, {"rotate_kv": True}])
def test_kernel_matches_reference_for_every_format(backend, dtype, options):
    inputs = make_inputs(5)
    pages, expected = make_pages(dtype), make_pages(dtype)
    got = rope_append_kv(*inputs, pages, **options, backend=backend)
    want = rope_append_kv(*inputs, expected, **options, backend=Backend.REFERENCE)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert_codes_agree(pages, expected)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size", "dtype"),
    [
        (32, 8, 128, 32, torch.float16),  # Llama-3-8B
        (9, 3, 64, 16, torch.bfloat16),  # SmolLM2-135M: head counts that are no power of two
        (12, 12, 96, 16, torch.float16),  # Phi-3: halves of 48 channels
        (8, 1, 256, 48, torch.bfloat16),  # Gemma
        (4, 4, 80, 16, torch.float16),  # StableLM 3B
        (4, 4, 100, 16, torch.float16),  # OpenLLaMA 3B: rows of 50 bytes
        (4, 2, 112, 32, torch.float16),
        (3, 1, 192, 16, torch.float16),
    ],
)
@pytest.mark.parametrize("rotate_kv", [False, True])
def test_kernel_matches_reference_for_model_shapes(
    backend, heads, kv_heads, head_dim, block_size, dtype, rotate_kv
):
    inputs = make_inputs(3, heads, kv_heads, head_dim, dtype=dtype)
    inputs[-1][1] = -1  # padding
    pages, expected = (make_pages("int4", kv_heads, head_dim, block_size) for _ in range(2))
    options = {"clip_ratio": 0.95, "rotate_kv": rotate_kv}
    got = rope_append_kv(*inputs, pages, **options, backend=backend)
    want = rope_append_kv(*inputs, expected, **options, backend=Backend.REFERENCE)
    torch.testing.assert_close(got, want, rtol=2**-7, atol=1e-3)
    assert_codes_agree(pages, expected)
    assert got.is_contiguous()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kv", ["int4", "int8", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size"),
    [
        (32, 8, 128, 32),
        (9, 3, 64, 16),
        (5, 5, 96, 16),
        (8, 1, 256, 48),
        (4, 2, 80, 16),
        (3, 1, 112, 32),
        (4, 4, 192, 16),
    ],
)
def test_cuda_equals_the_reference_bit_for_bit(heads, kv_heads, head_dim, block_size, kv, dtype):
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "dtype": dtype}
    options = [{}, {"clip_ratio": 0.95}, {"rotate_keys_in_cache": False}]
    offset = torch.randn(kv_heads, head_dim, generator=torch.Generator().manual_seed(3)) * 20
    options.append({"key_offset": offset})
    options += [{"rotate_kv": True}, {"rotate_kv": True, "key_offset": offset}]
    for seed, (option, tokens) in enumerate(itertools.product(options, (3, 70))):
        results = []
        for device, backend in (("cpu", Backend.REFERENCE), ("cuda", Backend.CUDA)):
            inputs = make_inputs(tokens, **shape, seed=seed, device=device)
            inputs[-1][1] = -1  # padding
            pages = make_pages(kv, kv_heads, head_dim, block_size, device)
            given = {
                name: value.to(device) if isinstance(value, torch.Tensor) else value
                for name, value in option.items()
            }
            q = rope_append_kv(*inputs, pages, **given, backend=backend)
            results.append((q.cpu(), pages.storage.cpu()))
        (want_q, want), (got_q, got) = results
        assert torch.equal(got_q, want_q), option.keys()
        assert torch.equal(got, want), option.keys()


NORMS = {
    "rms": (Norm(eps=1e-5), "head"),
    "rms of 1 + w": (Norm(eps=1e-5, weight_offset=1.0), "head"),
    "layer": (Norm(eps=1e-5, kind="layer"), "head"),
    "each head": (Norm(eps=1e-5, kind="layer"), "each"),
    # append.cu takes RMS norms, of one weight alone.
    "each head, rms": (Norm(eps=1e-5), "each"),
    "all heads": (Norm(eps=1e-5), "all"),
}


def make_norms(q, k, norm, axis):
    rng = torch.Generator().manual_seed(7)
    shapes = [
        {"head": x.shape[2:], "each": x.shape[1:], "all": (x.shape[1] * x.shape[2],)}[axis]
        for x in (q, k)
    ]
    weights = [1 + 0.3 * torch.randn(shape, generator=rng) for shape in shapes]
    return HeadNorms(*(weight.to(q) for weight in weights), norm, axis)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "dtype",
    # Triton's interpreter cuts float32 to bfloat16 instead of rounding it.
    [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)],
)
@pytest.mark.parametrize("kv", ["int4", "float16"])
@pytest.mark.parametrize(("norm", "axis"), NORMS.values(), ids=NORMS)
@pytest.mark.parametrize(
    ("tokens", "head_dim"), [(3, 64), (3, 96), pytest.param(70, 128, marks=pytest.mark.gpu)]
)
def test_heads_are_normalized_before_they_turn(tokens, head_dim, norm, axis, kv, dtype, backend):
    q, k, *rest = make_inputs(tokens, 5, 3, head_dim, dtype=dtype)
    norms = make_norms(q, k, norm, axis)
    pages, expected = (make_pages(kv, 3, head_dim) for _ in range(2))
    got = rope_append_kv(q, k, *rest, pages, norms=norms, rotate_kv=True, backend=backend)
    normed = head_norm(q, k, norms, backend="reference")
    want = rope_append_kv(*normed, *rest, expected, rotate_kv=True, backend="reference")
    # An ulp of the sum of squares moves a few normalized numbers by one or two steps of their
    # dtype; a channel of the Hadamard matrix's result is the sum of a share of all, up to 8.
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(got, want, rtol=2 * step, atol=4 * step)
    assert (got != want).float().mean() <= 0.05
    if kv == "float16":
        for ours, theirs in ((pages.keys, expected.keys), (pages.values, expected.values)):
            torch.testing.assert_close(ours, theirs, rtol=2 * step, atol=4 * step, equal_nan=True)
        return
    for ours, theirs in ((pages.keys, expected.keys), (pages.values, expected.values)):
        difference = (unpack_halves(ours).int() - unpack_halves(theirs).int()).abs()
        assert difference.max() <= 1
        assert (difference != 0).float().mean() <= 1e-2


def test_weights_that_do_not_fit_the_heads_are_refused():
    q, k, *rest = make_inputs(2)
    norms = make_norms(q, k[..., :32], *NORMS["rms"])
    with pytest.raises(ShapeError, match=r"weight \(64,\) for k \(2, 2, 64\), got \(32,\)"):
        rope_append_kv(q, k, *rest, make_pages("int4"), norms=norms)


def test_layers_of_two_rotary_tables_and_two_caches_take_turns():
    q, k, v, cos, sin, positions, slots = make_inputs(5)
    tables, shared = [(cos, sin), (cos.flip(1), sin.flip(1))], {}
    results = []
    for given in (None, shared, shared):  # the second round finds what the first has made
        results.append([])
        for rope, kv in itertools.product(tables, ("int4", "float16")):
            pages = make_pages(kv)
            rotated = rope_append_kv(
                q, k, v, *rope, positions, slots, pages, shared=given, backend=Backend.REFERENCE
            )
            results[-1].append((rotated, pages.storage))
    want, *rounds = results
    assert not torch.allclose(want[0][0], want[2][0])
    for got in rounds:
        for ours, theirs in zip(got, want, strict=True):
            assert all(map(torch.equal, ours, theirs))


@pytest.mark.gpu
def test_what_the_cuda_kernel_cannot_do_is_said_and_left_to_triton():
    inputs = make_inputs(2)
    with pytest.raises(BackendError, match=r"float16 and bfloat16, not torch.float32; use backend"):
        rope_append_kv(*inputs, make_pages("int4"), backend=Backend.CUDA)
    pages, expected = make_pages("int4"), make_pages("int4")
    rope_append_kv(*inputs, pages)
    rope_append_kv(*inputs, expected, backend=Backend.TRITON)
    assert torch.equal(pages.storage, expected.storage)
    inputs = make_inputs(2, head_dim=100, dtype=torch.float16)
    with pytest.raises(BackendError, match="8 channels of half a head, these heads have 100"):
        rope_append_kv(*inputs, make_pages("int4", head_dim=100), backend=Backend.CUDA)
    inputs = make_inputs(2, dtype=torch.float16)
    with pytest.raises(BackendError, match=r"caches, not float32"):
        rope_append_kv(*inputs, make_pages("float32"), backend=Backend.CUDA)
    inputs[0] = torch.nn.functional.pad(inputs[0], (0, 2))[:, :, :64]
    with pytest.raises(BackendError, match=r"8 channels at once, strides of q are \(264, 66, 1\)"):
        rope_append_kv(*inputs, make_pages("int4"), backend=Backend.CUDA)


def test_the_cuda_kernel_is_refused_on_a_cpu():
    inputs = make_inputs(1, device="cpu")
    with pytest.raises(BackendError, match=r"the tensors are on cpu; use backend triton"):
        rope_append_kv(*inputs, make_pages("int4", device="cpu"), backend=Backend.CUDA)


@pytest.mark.parametrize("backend", BACKENDS)
def test_codes_worked_out_by_hand(backend):
    q, k, v, cos, sin, positions, _ = make_inputs(1, 2, 1, dtype=torch.float16)
    positions[:] = 0  # angle 0: nothing turns
    k[0, 0] = 0.0
    k[0, 0, :4] = torch.tensor([15.0, 0.5, 1.5, 2.5])  # step 1; ties go to even
    v[0, 0] = 7.25  # constant: scale floor 2**-14, minimum 7.25, codes 0
    pages = make_pages("int4", 1)
    slots = torch.tensor([37], device=DEVICE)
    rope_append_kv(q, k, v, cos, sin, positions, slots, pages, backend=backend)
    assert unpack_halves(pages.keys[2, 0, 5])[:6].tolist() == [15, 0, 2, 2, 0, 0]
    assert pages.key_pairs[2, 0, 5].tolist() == [1.0, 0.0]
    assert pages.values[2, 0, 5].unique().tolist() == [0]
    assert pages.value_pairs[2, 0, 5].tolist() == [2.0**-14, 7.25]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_quarter_turn_swaps_the_halves(backend):
    q, k, v, cos, sin, positions, slots = make_inputs(1, dtype=torch.float16)
    cos, sin = torch.zeros_like(cos), torch.ones_like(sin)
    got = rope_append_kv(
        q, k, v, cos, sin, positions, slots, make_pages("float16"), backend=backend
    )
    low, high = q.chunk(2, dim=-1)
    assert torch.equal(got, torch.cat((-high, low), dim=-1))


@pytest.mark.parametrize("backend", [Backend.REFERENCE, Backend.TRITON])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rotating_q_and_k_leaves_scores_unchanged(head_dim, backend):
    inputs = make_inputs(4, heads=2, head_dim=head_dim)
    plain, turned = (make_pages("float32", head_dim=head_dim) for _ in range(2))
    q = rope_append_kv(*inputs, plain, backend=backend)
    turned_q = rope_append_kv(*inputs, turned, rotate_kv=True, backend=backend)
    slots = inputs[-1]

    def scores(queries, pages):
        keys = pages.keys[slots // 16, :, slots % 16]
        return torch.einsum("thd,thd->th", queries, keys)

    torch.testing.assert_close(scores(turned_q, turned), scores(q, plain), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(turned_q, q)


def test_a_spike_in_k_costs_less_error_when_rotated():
    """Why the option exists: one outlier channel sets the step of the whole head."""
    inputs = make_inputs(64)
    inputs[1][:, :, 3] = 30.0
    errors = []
    for rotate_kv in (False, True):
        exact, pages = make_pages("float32"), make_pages("int4")
        for target in (exact, pages):
            rope_append_kv(*inputs, target, rotate_kv=rotate_kv)
        slots = inputs[-1]
        k = [p.gather(torch.arange(6), 96)[0][slots] for p in (exact, pages)]
        errors.append((k[1] - k[0]).norm().item())
    assert errors[1] < 0.7 * errors[0]


def test_errors_name_the_numbers_that_do_not_fit():
    q, k, v, *rest = make_inputs(2)
    with pytest.raises(ShapeError, match=r"expected k and v \(2, 2, 64\), got \(2, 1, 64\)"):
        rope_append_kv(q, k[:, :1], v[:, :1], *rest, make_pages("int4"))
    with pytest.raises(ShapeError, match="needs rotate_keys_in_cache"):
        rope_append_kv(
            q, k, v, *rest, make_pages("int4"), rotate_keys_in_cache=False, rotate_kv=True
        )
