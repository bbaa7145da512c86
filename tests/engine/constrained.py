"""Texts drawn at random from everything that a constraint allows, one byte a token."""

import json
from functools import cache

import numpy as np

from quatom.engine.sampling import StructuredOutput
from quatom.engine.structured import limits
from quatom.engine.structured.probe import Workbench, attempt
from quatom.errors import RequestError
from tests.engine.doubles import EOS, VOCAB, byte_tokenizer

CLOSERS = frozenset(b'"}],')
"""Drawn more often, so that most texts end."""


@cache
def bench():
    import llguidance

    text = byte_tokenizer().backend_tokenizer.to_str()
    tokenizer = llguidance.LLTokenizer(text, n_vocab=VOCAB, eos_token=[EOS])
    special = {"<user>": 258, "<assistant>": 259}
    return Workbench(tokenizer, special, frozenset({EOS}))


def compile_here(kind, value):
    """What a trial answers, without a process of its own; raises RequestError where it refuses."""
    text = value if isinstance(value, str) else json.dumps(value)
    answer = attempt(bench(), StructuredOutput(kind, text))
    if "refused" in answer:
        raise RequestError(answer["refused"])
    return Constrained(answer["grammar"])


class Constrained:
    """A compiled constraint."""

    def __init__(self, grammar):
        import llguidance

        parser_limits = limits.parser_limits()
        self._matcher = llguidance.LLMatcher(
            bench().tokenizer, grammar, log_level=0, limits=parser_limits
        )
        assert not self._matcher.is_error()

    def draw(self, seed, length=300):
        """A random text as bytes, or None if it did not end within `length` tokens."""
        rng = np.random.default_rng(seed)
        matcher, ids = self._matcher.deep_copy(), []
        for _ in range(length):
            bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
            allowed = np.flatnonzero(np.unpackbits(bits, bitorder="little"))
            assert not matcher.is_error(), matcher.get_error()
            assert len(allowed), f"no way out after {bytes(i for i in ids if i < 256)}"
            weights = np.ones(len(allowed))
            weights[allowed == EOS] = 8
            weights[np.isin(allowed, list(CLOSERS))] = 6
            weights[(allowed >= 128) & (allowed < 256)] = 0.1
            token = int(rng.choice(allowed, p=weights / weights.sum()))
            assert matcher.consume_token(token)
            if token != EOS:
                ids.append(token)
            if token == EOS or matcher.is_stopped():
                return bytes(i for i in ids if i < 256)
        return None

    def texts(self, count=20, length=300):
        """Random texts that ended."""
        drawn = (self.draw(seed, length) for seed in range(count))
        return [text.decode() for text in drawn if text is not None]

    def accepts(self, text):
        """Whether the constraint allows a text; special tokens by their ids."""
        ids = list(text.encode()) if isinstance(text, str) else text
        matcher = self._matcher.deep_copy()
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()
