"""Masks on logits, on several threads, and in the background where they are slow."""

import ctypes
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from quatom.engine.config import EngineConfig
from quatom.engine.engine import Engine
from quatom.engine.llm import LLM
from quatom.engine.sampling import SamplingParams, StructuredOutput
from quatom.engine.structured import masks
from quatom.engine.structured.masks import Matcher, TokenMask, build_mask, wait_for_any
from quatom.errors import RequestError
from tests.engine.doubles import EOS, VOCAB, byte_tokenizer, hash_loaded

pytest.importorskip("llguidance")


def make_engine(**options):
    defaults = dict(max_num_seqs=16, max_num_batched_tokens=128, block_size=16, overlap=False)
    config = EngineConfig(**{**defaults, **options, "kv_cache_memory": 500 * 16 * 8})
    return Engine(hash_loaded(tokenizer=byte_tokenizer()), config)


@pytest.fixture(scope="module")
def factory():
    engine = make_engine()
    yield engine.requests
    engine.requests.close()


def matcher_of(factory, regex):
    return factory.constraints.compile(StructuredOutput("regex", regex)).matcher()


def allowed(row):
    return np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))


@pytest.mark.parametrize("vocab", [32, 97, 300])
def test_forbidden_tokens_get_minus_infinity(vocab):
    rng = np.random.default_rng(vocab)
    bits = rng.integers(0, 2, size=(2, -(-vocab // 32) * 32)).astype(np.uint8)
    words = np.packbits(bits, axis=1, bitorder="little").view(np.int32)
    logits = torch.from_numpy(rng.standard_normal((4, vocab)).astype(np.float32))
    before = logits.clone()
    TokenMask(np.array([1, 3]), words).forbid(logits)
    assert torch.equal(logits[[0, 2]], before[[0, 2]])
    for row, row_bits in ((1, bits[0]), (3, bits[1])):
        expected = before[row].masked_fill(torch.from_numpy(row_bits[:vocab] == 0), -torch.inf)
        assert torch.equal(logits[row], expected)


def test_rows_without_a_constraint_are_left_out(factory):
    assert build_mask([None, None]) is None
    first, second = matcher_of(factory, "[ab]c"), matcher_of(factory, "x[yz]")
    mask = build_mask([None, first, None, second])
    assert mask.rows.tolist() == [1, 3]
    assert allowed(mask.words[0]).tolist() == [ord("a"), ord("b")]
    assert first.accept(ord("a"))
    assert second.accept(ord("x"))
    mask = build_mask([first, second])
    assert allowed(mask.words[0]).tolist() == [ord("c")]
    assert allowed(mask.words[1]).tolist() == [ord("y"), ord("z")]


def test_copies_do_not_share_their_state(factory):
    compiled = factory.constraints.compile(StructuredOutput("regex", "(ab|cd)e"))
    one, other = compiled.matcher(), compiled.matcher()
    assert one.accept(ord("a"))
    assert other.accept(ord("c"))
    assert [allowed(row).tolist() for row in build_mask([one, other]).words] == [
        [ord("b")],
        [ord("d")],
    ]


def test_a_token_outside_of_the_constraint_is_an_error(factory):
    matcher = matcher_of(factory, "[ab]c")
    assert not matcher.accept(ord("z"))
    assert "cannot be enforced any further" in matcher.error
    assert allowed(build_mask([matcher]).words[0]).size >= VOCAB  # the row is not used any more


def test_a_slow_mask_is_computed_in_the_background(factory, monkeypatch):
    matcher = matcher_of(factory, "[ab]c")
    matcher.slow = True
    assert matcher.ready  # the first mask is known
    matcher.accept(ord("a"))
    assert matcher.job is not None
    wait_for_any([None, matcher], 10)
    assert matcher.ready
    assert allowed(build_mask([matcher]).words[0]).tolist() == [ord("c")]
    assert not matcher.slow  # it was not, in the end


def test_a_slow_constraint_ends_its_text_too(factory, monkeypatch):
    monkeypatch.setattr(masks, "SLOW_MASK_SECONDS", -1.0)  # slow for ever
    matcher = matcher_of(factory, "ab")
    matcher.slow = True
    for token in (*b"ab", EOS):
        assert allowed(build_mask([matcher]).words[0]).tolist() == [token]
        assert matcher.accept(token)
    assert matcher.terminated


def test_a_slow_constraint_reports_its_error_at_the_next_token(factory, monkeypatch):
    monkeypatch.setattr(masks, "SLOW_MASK_SECONDS", -1.0)
    matcher = matcher_of(factory, "ab")
    matcher.slow = True
    assert matcher.accept(ord("z"))
    build_mask([matcher])
    assert not matcher.accept(ord("a"))
    assert matcher.error


def test_a_late_call_sends_its_masks_to_the_background(factory, monkeypatch):
    monkeypatch.setattr(masks, "LATE_SECONDS", -1.0)
    matcher = matcher_of(factory, "[ab]cd")
    matcher.accept(ord("a"))
    build_mask([matcher])
    assert matcher.slow


class Slow:
    """An LLMatcher that allows everything, after a while."""

    def __init__(self, seconds):
        self.seconds = seconds
        self.busy = False

    def is_stopped(self):
        assert not self.busy, "llguidance does not allow two calls at once"
        return False

    def is_error(self):
        return False

    def consume_token(self, token_id):
        assert not self.busy, "llguidance does not allow two calls at once"
        return True

    def unsafe_compute_mask_ptr(self, address, size):
        self.busy = True
        time.sleep(self.seconds)
        self.busy = False
        ctypes.memset(address, 0xFF, size)


@dataclass
class Constraint:
    """A compiled constraint."""

    seconds: float
    slow: bool
    error: str = ""

    def matcher(self):
        first = np.full(-(-VOCAB // 32), -1, dtype=np.int32)
        made = Matcher(Slow(self.seconds), first, slow=self.slow)
        if self.error:
            made.fail(self.error)
        return made


@pytest.mark.parametrize("overlap", [False, True])
def test_only_the_slow_sequence_waits(monkeypatch, overlap):
    monkeypatch.setattr(masks, "SLOW_MASK_SECONDS", -1.0)  # slow for ever
    engine = make_engine(overlap=overlap)
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    few = SamplingParams(
        temperature=0.0,
        max_tokens=10,
        ignore_eos=True,
        structured=StructuredOutput("regex", "(.|\n)*"),
    )
    engine.add(engine.make_request("slow", [1, 2, 3], few, Constraint(0.2, slow=True)))
    engine.add_request("other", [4, 5, 6], params)
    gaps, last, tokens = [], time.monotonic(), {"slow": [], "other": []}
    while len(tokens["other"]) < 40:
        for delta in engine.step():
            tokens[delta.request_id] += delta.token_ids
            if delta.request_id == "other":
                gaps.append(time.monotonic() - last)
                last = time.monotonic()
    assert sorted(gaps)[len(gaps) // 2] < 0.1  # a step that waited would take 0.2 s
    while engine.has_work:
        for delta in engine.step():
            tokens[delta.request_id] += delta.token_ids
    alone = make_engine()
    alone.add(alone.make_request("slow", [1, 2, 3], few, Constraint(0.0, slow=True)))
    expected = []
    while alone.has_work:
        expected += [t for delta in alone.step() for t in delta.token_ids]
    assert tokens["slow"] == expected


def test_a_constraint_that_breaks_ends_its_own_request():
    engine = make_engine()
    engine.add_request("fine", [1], SamplingParams(temperature=0.0, max_tokens=5))
    params = SamplingParams(max_tokens=5, structured=StructuredOutput("regex", "a"))
    engine.add(engine.make_request("broken", [2], params, Constraint(0.0, False, "too many items")))
    last = {}
    while engine.has_work:
        last |= {delta.request_id: delta for delta in engine.step()}
    assert last["fine"].finish_reason == "length"
    assert last["broken"].finish_reason == "error"
    assert last["broken"].refused
    assert "too many items" in last["broken"].error
    engine.check_accounting()


@pytest.mark.parametrize("overlap", [False, True])
def test_offline_generation_is_constrained(overlap):
    engine = make_engine(overlap=overlap)
    choices = StructuredOutput("choice", '["yes", "no"]')
    schema = StructuredOutput(
        "json_schema", '{"type": "array", "items": {"const": 7}, "minItems": 2}'
    )
    params = [
        SamplingParams(n=4, max_tokens=50, seed=1, structured=choices),
        SamplingParams(max_tokens=50, seed=1),
        SamplingParams(max_tokens=50, seed=1, structured=schema, ignore_eos=True),
    ]
    llm = LLM.from_engine(engine)
    one, free, two = llm.generate(["a", "b", "c"], params)
    assert {c.text for c in one.outputs} <= {"yes", "no"}
    assert len(free.token_ids) == 50
    assert two.text.startswith("[7, 7")
    unique = StructuredOutput("json_schema", '{"uniqueItems": true}')
    with pytest.raises(RequestError, match="uniqueItems"):
        llm.generate("a", SamplingParams(structured=unique))
    engine.check_accounting()
    engine.requests.close()
