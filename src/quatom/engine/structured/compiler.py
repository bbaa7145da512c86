"""ConstraintCompiler: constraints of requests to matchers, in threads and processes of their own.

Each of COMPILERS threads owns a process that tries a constraint first (`trial`). What passes is
compiled once more here, in a call that holds no lock of Python, and kept for the next request.
"""

import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from quatom.engine.sampling import StructuredOutput
from quatom.engine.structured.limits import parser_limits
from quatom.engine.structured.masks import Matcher, words_of_mask
from quatom.engine.structured.trials import Trials
from quatom.errors import QueueFullError, RequestError

COMPILERS = 2
MAX_WAITING = 64
"""Constraints that may wait for a compiler; more are refused (HTTP 429)."""
MAX_KEPT = 32
"""Compiled constraints that are kept, those used last."""


class CompiledConstraint:
    """A constraint that passed its trial; every sequence takes a matcher of its own."""

    def __init__(self, tokenizer: Any, vocab_size: int, grammar: str, *, slow: bool) -> None:
        from llguidance import LLMatcher

        self._matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=parser_limits())
        self._slow = slow
        self._first_mask = np.zeros(words_of_mask(vocab_size), dtype=np.int32)
        self._matcher.unsafe_compute_mask_ptr(self._first_mask.ctypes.data, self._first_mask.nbytes)
        if self._matcher.is_error():
            raise RequestError(
                f"the constraint does not compile: {self._matcher.get_error()[:300]}"
            )

    def matcher(self) -> Matcher:
        """The beginning of a text."""
        return Matcher(self._matcher.deep_copy(), self._first_mask, slow=self._slow)


class Compilation:
    """A constraint on its way."""

    def __init__(self, wanted: StructuredOutput) -> None:
        self.wanted = wanted
        self.future: Future[CompiledConstraint] = Future()
        self.trials: Trials | None = None

    def cancel(self) -> None:
        """Give it up: nobody waits for it any more. Returns at once."""
        if not self.future.cancel() and (trials := self.trials) is not None:
            threading.Thread(target=trials.cancel, args=(self,), daemon=True).start()


class ConstraintCompiler:
    """Compiles constraints for one tokenizer. Any thread may call it."""

    def __init__(self, tokenizer: Any, vocab_size: int, stop_token_ids: tuple[int, ...]) -> None:
        """Building llguidance's tokenizer takes about a second and holds Python's lock.

        Raises:
            RequestError: there is no tokenizer, none of the tokenizers library, or no
                end-of-sequence token.
        """
        if tokenizer is None:
            raise RequestError("structured output needs a tokenizer, and this model has none")
        if not stop_token_ids:
            raise RequestError("structured output needs an end-of-sequence token; there is none")
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise RequestError(
                f"structured output needs a tokenizer.json; {type(tokenizer).__name__} has none"
            )
        from llguidance import LLTokenizer

        text, stops = _without_padding(backend), list(stop_token_ids)
        try:
            self._tokenizer = LLTokenizer(text, n_vocab=vocab_size, eos_token=stops)
        except ValueError as error:
            raise RequestError(
                f"structured output cannot use this model's tokenizer: {str(error)[:200]}"
            ) from error
        self._vocab_size = vocab_size
        setup = {
            "tokenizer": text,
            "vocab_size": vocab_size,
            "stop_token_ids": stops,
            "special_tokens": {
                token.content: token_id
                for token_id, token in backend.get_added_tokens_decoder().items()
                if token.special
            },
        }
        self._trials = [Trials(setup) for _ in range(COMPILERS)]
        self._free = [*self._trials]
        self._threads = ThreadPoolExecutor(COMPILERS, thread_name_prefix="quatom-constraints")
        self._kept: OrderedDict[StructuredOutput, CompiledConstraint] = OrderedDict()
        self._waiting = 0
        self._lock = threading.Lock()

    def submit(self, wanted: StructuredOutput) -> Compilation:
        """Compile a constraint in the background.

        Raises:
            QueueFullError: too many wait already.
        """
        compilation = Compilation(wanted)
        if (kept := self._find(wanted)) is not None:
            compilation.future.set_result(kept)
            return compilation
        with self._lock:
            if self._waiting >= MAX_WAITING:
                raise QueueFullError(
                    f"{self._waiting} constraints wait to be compiled, which is the limit; "
                    "try again later"
                )
            self._waiting += 1
        self._threads.submit(self._run, compilation)
        return compilation

    def compile(self, wanted: StructuredOutput) -> CompiledConstraint:
        """Compile a constraint and wait for it.

        Raises:
            RequestError: it is invalid, cannot be enforced, or is over the budget.
        """
        return self.submit(wanted).future.result()

    def close(self) -> None:
        """End the processes; compilations under way fail."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for trials in self._trials:
            trials.close()

    def _run(self, compilation: Compilation) -> None:
        with self._lock:
            self._waiting -= 1
            if not compilation.future.set_running_or_notify_cancel():
                return
            compilation.trials = trials = self._free.pop()
        try:
            compilation.future.set_result(self._compile(compilation, trials))
        except BaseException as error:
            compilation.future.set_exception(error)
        finally:
            with self._lock:
                self._free.append(trials)

    def _compile(self, compilation: Compilation, trials: Trials) -> CompiledConstraint:
        wanted = compilation.wanted
        if (kept := self._find(wanted)) is not None:  # compiled while this one waited
            return kept
        tried = trials.run(wanted, compilation)
        compiled = CompiledConstraint(
            self._tokenizer, self._vocab_size, tried["grammar"], slow=tried["slow"]
        )
        with self._lock:
            self._kept[wanted] = compiled
            while len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
        return compiled

    def _find(self, wanted: StructuredOutput) -> CompiledConstraint | None:
        with self._lock:
            if wanted in self._kept:
                self._kept.move_to_end(wanted)
            return self._kept.get(wanted)


def _without_padding(backend: Any) -> str:
    from copy import copy

    plain = copy(backend)
    plain.no_padding()
    plain.no_truncation()
    return plain.to_str()
