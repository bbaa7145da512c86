"""Masks: which tokens keep a text within its constraint.

A constraint's automaton is llguidance's. Most masks take a fraction of a millisecond; those of all
sequences of a step are computed in one call on several threads. A constraint whose masks are slow
has each computed in the background as soon as its last token is known, and its sequence is left out
of steps until the mask is there: it waits, and nobody else does.
"""

import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from quatom.engine.structured.limits import SLOW_MASK_SECONDS
from quatom.engine.transfer import to_device

if TYPE_CHECKING:
    from llguidance import LLExecutor

LATE_SECONDS = 0.02
"""A call for a step's masks that takes longer makes all of them slow, each until it is not."""


class Matcher:
    """The state of one sequence's constraint."""

    def __init__(self, matcher: Any, mask: np.ndarray, *, slow: bool) -> None:
        """Wrap an LLMatcher whose next mask, (ceil(vocab / 32),) int32, is known."""
        self.matcher = matcher
        self.slow = slow
        self.error = ""
        """Why the sequence must end, if it must."""
        self.terminated = False
        """Whether the text is complete and nothing can follow."""
        self.words = mask.size
        """int32 words of a mask."""
        self._mask: np.ndarray | None = mask
        self._job: Future[np.ndarray] | None = None

    @property
    def ready(self) -> bool:
        """Whether a step need not wait for the next mask."""
        return self._job is None or self._job.done()

    @property
    def job(self) -> "Future[np.ndarray] | None":
        """The computation of the next mask in the background."""
        return self._job

    def accept(self, token_id: int) -> bool:
        """Advance by a token. False: the sequence must end, `error` says why.

        A slow matcher advances in the background: what it finds out shows at the next call.
        """
        if not self.error and not self.terminated:
            self._mask = None
            if self.slow:
                self._job = _background().submit(self._advance, token_id)
            else:
                self._consume(token_id)
        return not self.error

    def known_mask(self) -> np.ndarray | None:
        """The next mask, unless it is left to `build_mask`; waits for one under way."""
        if self._job is not None:
            self._mask, self._job = self._job.result(), None
        return self._mask

    def fail(self, reason: str) -> None:
        """Note why no further token can be chosen."""
        line = reason.strip().partition("\n")[0][:300]
        self.error = f"the constraint cannot be enforced any further: {line}"

    def _consume(self, token_id: int) -> None:
        if self.matcher.consume_token(token_id):
            self.terminated = self.matcher.is_stopped()
        else:
            self.fail(self.matcher.get_error())

    def _advance(self, token_id: int) -> np.ndarray:
        # Copies of one constraint share a lock, which the engine's thread had better not wait for.
        started = time.thread_time()
        self._consume(token_id)
        mask = np.zeros(self.words, dtype=np.int32)
        if not self.error:
            self.matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        self.slow = time.thread_time() - started > SLOW_MASK_SECONDS
        return mask


@dataclass(frozen=True, slots=True)
class TokenMask:
    """Allowed tokens of the rows that have a constraint, R of them."""

    rows: np.ndarray  # (R,) int64
    words: np.ndarray  # (R, ceil(vocab / 32)) int32; bit i % 32 of word i // 32: token i is allowed

    def forbid(self, logits: Tensor) -> None:
        """Set logits of tokens that are not allowed to -inf, in place. logits: (M, vocab)."""
        device = logits.device
        octets = to_device(self.words.view(np.uint8), device)
        bits = 1 << torch.arange(8, dtype=torch.uint8, device=device)
        forbidden = (octets[:, :, None] & bits).flatten(1)[:, : logits.shape[1]] == 0
        rows = to_device(self.rows, device)
        logits[rows] = logits[rows].masked_fill_(forbidden, -torch.inf)


def words_of_mask(vocab_size: int) -> int:
    """int32 words that hold one bit for each token."""
    return -(-vocab_size // 32)


def build_mask(matchers: Sequence[Matcher | None]) -> TokenMask | None:
    """The masks of a step's rows; None: no row has a constraint.

    A matcher that can name no further token gets `error`, and a mask that allows all of them.
    """
    rows = [row for row, matcher in enumerate(matchers) if matcher is not None]
    if not rows:
        return None
    asked = [matcher for matcher in matchers if matcher is not None]
    known = [matcher.known_mask() for matcher in asked]
    words = np.zeros((len(rows), asked[0].words), dtype=np.int32)
    for row, mask in zip(words, known, strict=True):
        if mask is not None:
            row[:] = mask
    missing = [i for i, mask in enumerate(known) if mask is None]
    if missing:
        started = time.monotonic()
        pairs = [(asked[i].matcher, i) for i in missing]
        _executor().unsafe_compute_mask_ptr(pairs, words.ctypes.data, words.strides[0], len(words))
        if time.monotonic() - started > LATE_SECONDS:
            for i in missing:
                asked[i].slow = True
    for matcher, row in zip(asked, words, strict=True):
        if not matcher.error and matcher.matcher.is_error():
            matcher.fail(matcher.matcher.get_error())
        elif not matcher.error and not row.any():
            matcher.fail("this model has no token with which the text can go on")
        if matcher.error:
            row[:] = -1
    return TokenMask(np.array(rows, dtype=np.int64), words)


def wait_for_any(matchers: Iterable[Matcher | None], seconds: float) -> None:
    """Wait until a mask in the background is there, for this long at most."""
    jobs = [matcher.job for matcher in matchers if matcher is not None]
    wait([job for job in jobs if job is not None], seconds, FIRST_COMPLETED)


@cache
def _executor() -> "LLExecutor":
    from llguidance import LLExecutor

    return LLExecutor()


@cache
def _background() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2), "quatom-slow-masks")
