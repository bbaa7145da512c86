"""A prompt and SamplingParams -> a checked request. Any thread may make one.

Slow parts, such as compiling a constraint, happen here and not in the engine's thread.
"""

import itertools
import random
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from quatom.engine.detokenize import Detokenizer
from quatom.engine.model import ModelLimits
from quatom.engine.outputs import Timestamps
from quatom.engine.sampling import SamplingParams, StructuredOutput
from quatom.engine.sequence import Sequence
from quatom.engine.structured.compiler import (
    Compilation,
    CompiledConstraint,
    ConstraintCompiler,
)
from quatom.engine.token_rules import BadWords, TokenBias
from quatom.errors import RequestError

SEED_STEP = 0x9E3779B97F4A7C15
"""Added to the seed for each further completion of a request (2**64 over the golden ratio)."""


@dataclass(frozen=True, slots=True)
class Request:
    """A checked request, ready to be added to an engine."""

    request_id: str
    sequences: list[Sequence]

    @property
    def num_sequences(self) -> int:
        """Completions that it asks for."""
        return len(self.sequences)


class RequestFactory:
    """Makes the requests of one model."""

    def __init__(self, model_config: ModelLimits, tokenizer: Any, max_model_len: int) -> None:
        self._model_config = model_config
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._compiler: ConstraintCompiler | None = None
        self._compiler_lock = threading.Lock()
        self._arrivals = itertools.count()
        self._seeds = random.SystemRandom()

    @property
    def constraints(self) -> ConstraintCompiler:
        """Compiles constraints; made when it is first asked for, which takes about a second.

        Raises:
            RequestError: the model has no tokenizer that can be used for them.
        """
        with self._compiler_lock:
            if self._compiler is None:
                config = self._model_config
                self._compiler = ConstraintCompiler(
                    self._tokenizer, config.vocab_size, config.eos_token_ids
                )
            return self._compiler

    def warm_up(self) -> None:
        """Build what the first constrained request would wait for."""
        with suppress(RequestError):  # each such request will be refused with it
            _ = self.constraints

    def close(self) -> None:
        """End the processes that try constraints."""
        if self._compiler is not None:
            self._compiler.close()

    def compile(self, wanted: StructuredOutput) -> Compilation:
        """Start to compile a constraint; its result goes to `make`.

        Raises:
            RequestError: the model has no tokenizer that can be used for it.
            QueueFullError: too many constraints wait to be compiled.
        """
        return self.constraints.submit(wanted)

    def make(
        self,
        request_id: str,
        prompt_ids: list[int],
        params: SamplingParams,
        constraint: CompiledConstraint | None = None,
    ) -> Request:
        """Check a request and build its sequences.

        Args:
            request_id: what deltas are marked with.
            prompt_ids: token ids of the prompt.
            params: how to sample.
            constraint: what `params.structured` was compiled to; None: compile it now, and wait.

        Raises:
            RequestError: the prompt is empty, too long or holds ids that the model does not have,
                a parameter does not fit the model, or a constraint cannot be enforced.
        """
        params.check_vocabulary(self._model_config.vocab_size)
        # A prompt that is only scored samples one token too, which nobody sees.
        max_total = len(prompt_ids) + max(1, self._check_lengths(prompt_ids, params))
        if self._tokenizer is None and params.stop:
            raise RequestError("stop strings need a tokenizer, and this model has none")
        if constraint is None and params.structured is not None:
            constraint = self.compile(params.structured).future.result()
        arrival, now = next(self._arrivals), time.monotonic()
        seed = self._seeds.getrandbits(63) if params.seed is None else params.seed
        bias = TokenBias.of(params.logit_bias)
        bad_words = BadWords.of(params.bad_words, self._tokenizer)
        sequences = [
            Sequence(
                request_id=request_id,
                index=index,
                order=(arrival, index),
                token_ids=list(prompt_ids),
                num_prompt=len(prompt_ids),
                params=params,
                seed=seed + index * SEED_STEP,  # completion 0 is what n = 1 gives
                max_total=max_total,
                times=Timestamps(arrival=now),
                detokenizer=self._detokenizer(prompt_ids, params),
                matcher=None if constraint is None else constraint.matcher(),
                bias=bias,
                bad_words=bad_words,
            )
            for index in range(params.n)
        ]
        for child in sequences[1:]:
            child.parent = sequences[0]
            child.prompt_logprobs = sequences[0].prompt_logprobs  # one list for one prompt
        sequences[0].children = sequences[1:]
        return Request(request_id, sequences)

    def _check_lengths(self, prompt_ids: list[int], params: SamplingParams) -> int:
        """Tokens that may be generated."""
        if not prompt_ids:
            raise RequestError("the prompt has no tokens; it needs at least 1")
        vocab_size = self._model_config.vocab_size
        if min(prompt_ids) < 0 or max(prompt_ids) >= vocab_size:
            wrong = next(t for t in prompt_ids if not 0 <= t < vocab_size)
            raise RequestError(
                f"the prompt holds token id {wrong}; the model has {vocab_size} tokens, 0 to "
                f"{vocab_size - 1}"
            )
        room = self._max_model_len - len(prompt_ids)
        if room < (params.max_tokens != 0):
            raise RequestError(
                f"the prompt has {len(prompt_ids)} tokens; this model's limit is "
                f"{self._max_model_len}, prompt and output together: shorten the prompt"
            )
        max_tokens = room if params.max_tokens is None else params.max_tokens
        if max_tokens > room:
            raise RequestError(
                f"the prompt has {len(prompt_ids)} tokens and max_tokens is {max_tokens}, "
                f"{len(prompt_ids) + max_tokens} together; this model's limit is "
                f"{self._max_model_len}: shorten the prompt or lower max_tokens to {room}"
            )
        return max_tokens

    def _detokenizer(self, prompt_ids: list[int], params: SamplingParams) -> Detokenizer | None:
        if self._tokenizer is None or not params.detokenize:
            return None
        return Detokenizer(self._tokenizer, prompt_ids, params)
