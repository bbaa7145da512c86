"""Rotary tables against those of transformers' own classes, and scores of reordered heads."""

import importlib
import math

import pytest
import torch

from quatom.errors import ModelError
from quatom.families.registry import read_config
from quatom.families.spec import Rope, RopeScaling
from quatom.numerics.rotary import head_order, inverse_frequencies, rotary_table
from tests.families.models import LLAMA3, TINY, YARN, longrope, model_class, tiny_config

STILL = ("opt", "gpt2", "gpt_bigcode", "gpt_neo")
TURNING = [name for name in TINY if name not in (*STILL, "gptj")]
SCALINGS = {
    "default": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
    "llama3": LLAMA3,
    "llama3 as published": LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 8192},
    "yarn": YARN,
    "yarn, whole": YARN | {"factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.0},
    "yarn, ramp": YARN | {"beta_fast": 8.0, "beta_slow": 2.0, "truncate": False},
    "yarn, no ramp": YARN | {"beta_fast": 1.0, "beta_slow": 1.0, "truncate": False},
    "yarn, factor": YARN | {"attention_factor": 0.75},
    "longrope": longrope(64),
    "longrope, factor": longrope(64, factor=16.0),
}
# Angles are the same float32 numbers; cos and sin of vectors and of their last few elements may
# come from two implementations, each within 1 ulp of the exact value, at most 1.5 here.
TABLE = {"rtol": 0.0, "atol": 2 * 1.5 * 2**-23}


def llama(scaling: dict):
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        num_hidden_layers=1,
        max_position_embeddings=512,
        rope_parameters=dict(scaling),
    )


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("length", [200, 400, 2000])
def test_frequencies_and_attention_factors_of_every_kind(name, length):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    written = llama(SCALINGS[name])
    kind = written.rope_parameters["rope_type"]
    make = ROPE_INIT_FUNCTIONS.get(kind, LlamaRotaryEmbedding.compute_default_rope_parameters)
    theirs, factor = make(written, device="cpu", seq_len=length)
    (rope,) = read_config(written.to_dict() | {"architectures": ["LlamaForCausalLM"]}).ropes()
    # The same operations in the same order: the same bits.
    assert torch.equal(inverse_frequencies(rope, length), theirs)
    assert (1.0 if rope.scaling is None else rope.scaling.attention_factor) == factor


def rotary_modules(name: str):
    """transformers' module of each layer type, the layer index it serves, and its arguments."""
    written = tiny_config(name)
    language_model = model_class(TINY[name][0])
    family = importlib.import_module(language_model.__module__)
    prefix = language_model.__name__.removesuffix("ForCausalLM")
    module = getattr(family, f"{prefix}RotaryEmbedding")(written)
    per_type = isinstance(module.rope_type, dict)
    types = written.layer_types if per_type else [None]
    for layer, kind in enumerate(types):
        yield family, module, layer, {} if kind is None else {"layer_type": kind}


@pytest.mark.parametrize("name", TURNING)
@pytest.mark.parametrize("length", [100, 512])
def test_tables_are_those_of_each_family(name, length):
    if name == "phimoe" and length > 100:
        pytest.skip("transformers 5.24 gives Phi-3.5-MoE the short factors at every length")
    config = read_config(tiny_config(name).to_dict())
    for _, module, layer, arguments in rotary_modules(name):
        attention = config.layers[layer].attention
        cos, sin = rotary_table(attention.rope, attention.head_dim, length, max_length=length)
        theirs = module(torch.zeros(1), torch.arange(length)[None], **arguments)
        pairs = attention.rope.dim // 2
        # Cohere repeats each angle for the two channels that turn together, others all angles.
        if TINY[name][0].startswith("Cohere"):
            theirs = tuple(whole[..., ::2] for whole in theirs)
        for ours, whole, still in zip((cos, sin), theirs, (1.0, 0.0), strict=True):
            assert ours.shape == (length, attention.head_dim // 2)
            assert ours.dtype == torch.float32
            torch.testing.assert_close(ours[:, :pairs], whole[0, :, :pairs], **TABLE)
            assert (ours[:, pairs:] == still).all()


def turned(head, cos, sin):
    """What kernels do: (T, D) turned by tables (T, D / 2)."""
    first, second = head.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


@pytest.mark.parametrize("name", TURNING)
def test_scores_of_reordered_heads_are_those_of_the_family(name):
    length = 60
    generator = torch.Generator().manual_seed(1)
    config = read_config(tiny_config(name).to_dict())
    family, module, layer, arguments = next(rotary_modules(name))
    attention = config.layers[layer].attention
    q, k = torch.randn(2, length, attention.head_dim, generator=generator)
    cos, sin = module(torch.zeros(1), torch.arange(length)[None], **arguments)
    width = cos.shape[-1]
    # These cut the turning channels out before they call this; the others take whole heads.
    cut = width if TINY[name][0] in ("StableLm", "Phi") else attention.head_dim
    parts = family.apply_rotary_pos_emb(q[None, None, :, :cut], k[None, None, :, :cut], cos, sin)
    their_q, their_k = (
        torch.cat([part[0, 0], rest[:, cut:]], dim=-1)
        for part, rest in zip(parts, (q, k), strict=True)
    )
    tables = rotary_table(attention.rope, attention.head_dim, length, max_length=length)
    order = head_order(attention.rope, attention.head_dim)
    if order is not None:
        q, k = q[:, order], k[:, order]
    scores = turned(q, *tables) @ turned(k, *tables).T
    # Sums of head_dim products in another order: each addition rounds a number of up to 64.
    torch.testing.assert_close(
        scores, their_q @ their_k.T, rtol=0.0, atol=attention.head_dim * 64 * 2**-24
    )


def test_order_of_channels():
    assert head_order(None, 8) is None
    assert head_order(Rope(theta=1e4, dim=8), 8) is None
    for rope, order in [
        (Rope(theta=1e4, dim=4), [0, 1, 4, 5, 2, 3, 6, 7]),
        (Rope(theta=1e4, dim=8, interleaved=True), [0, 2, 4, 6, 1, 3, 5, 7]),
        (Rope(theta=1e4, dim=4, interleaved=True), [0, 2, 4, 5, 1, 3, 6, 7]),
    ]:
        found = head_order(rope, 8)
        assert found.dtype == torch.int64
        assert found.tolist() == order


def test_no_rotary_embedding_turns_nothing():
    cos, sin = rotary_table(None, 64, 10, max_length=10)
    assert cos.shape == sin.shape == (10, 32)
    assert (cos == 1).all()
    assert (sin == 0).all()


def test_the_table_is_cos_and_sin_of_position_times_frequency():
    cos, sin = rotary_table(Rope(theta=1e4, dim=64), 64, 100, max_length=100)
    for position, pair in [(0, 0), (1, 0), (99, 0), (7, 5), (99, 31)]:
        exact = position * 10000.0 ** (-2 * pair / 64)
        # float32 angles up to 99 are wrong by 99 * 2**-24.
        assert cos[position, pair].item() == pytest.approx(math.cos(exact), abs=2e-5)
        assert sin[position, pair].item() == pytest.approx(math.sin(exact), abs=2e-5)


def test_llama3_keeps_short_waves_and_stretches_long_ones():
    scaling = RopeScaling(kind="llama3", factor=8.0, original_max_position=64)
    plain = inverse_frequencies(Rope(theta=1e4, dim=64), 1)
    scaled = inverse_frequencies(Rope(theta=1e4, dim=64, scaling=scaling), 1)
    waves = 2 * math.pi / plain
    short, long = waves < 64 / 4, waves > 64 / 1
    assert short.any()
    assert long.any()
    assert torch.equal(scaled[short], plain[short])
    torch.testing.assert_close(scaled[long], plain[long] / 8)
    between = ~short & ~long
    assert ((scaled[between] < plain[between]) & (scaled[between] > plain[between] / 8)).all()


def test_longrope_changes_for_all_positions_at_once():
    config = read_config(tiny_config("phi3-longrope").to_dict())
    attention = config.layers[0].attention
    short, _ = rotary_table(attention.rope, attention.head_dim, 50, max_length=256)
    long, _ = rotary_table(attention.rope, attention.head_dim, 50, max_length=257)
    assert not torch.equal(short[1:], long[1:])


def test_a_scaling_without_its_length_is_refused():
    rope = Rope(theta=1e4, dim=64, scaling=RopeScaling(kind="yarn", factor=2.0))
    with pytest.raises(ModelError, match="yarn needs original_max_position"):
        inverse_frequencies(rope, 10)
