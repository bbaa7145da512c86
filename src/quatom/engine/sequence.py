"""Sequence: one completion under way. It holds counters and derives everything else from them.

    token_ids      prompt and output tokens that the host knows
    in_flight      tokens sampled on the device but not yet read back: 0 or 1, 2 within a step
    num_computed   tokens whose K and V are in the cache, or will be once launched steps have run

A sequence decodes when all but its last token are computed, and prefills otherwise: a preempted
sequence is one with num_computed set back to zero, and recomputing it needs no further state.
"""

from array import array
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING

from quatom.engine.block_pool import ROOT_DIGEST, block_digest
from quatom.engine.outputs import FinishReason, Timestamps, TokenLogprobs
from quatom.engine.sampling import SamplingParams

if TYPE_CHECKING:
    from quatom.engine.detokenize import Detokenizer
    from quatom.engine.structured.masks import Matcher
    from quatom.engine.token_rules import BadWords, TokenBias


class Status(Enum):
    """Where a sequence is."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """One completion of one request."""

    request_id: str
    index: int
    """Which of the request's n completions this is."""
    order: tuple[int, int]
    """(number of arrival, index): smaller is served first and preempted last."""
    token_ids: list[int]
    num_prompt: int
    params: SamplingParams
    seed: int
    max_total: int
    """Length at which generation ends: prompt + max_tokens (at least 1), or the model's length."""
    times: Timestamps
    detokenizer: "Detokenizer | None" = None
    matcher: "Matcher | None" = None
    bias: "TokenBias | None" = None
    bad_words: "BadWords | None" = None

    status: Status = Status.WAITING
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    num_computed: int = 0
    num_launched: int = 0
    """num_computed without the step that is being scheduled: contents that a copy may read."""
    num_cached: int = 0
    """Prompt tokens found in the prefix cache when first scheduled."""
    num_cache_written: int = 0
    """Prompt tokens of the blocks that became known prefixes; again after a preemption."""
    in_flight: int = 0
    sample_row: int = 0
    """Row of this sequence among the tokens sampled by the last launched step."""
    block_table: "array[int]" = field(default_factory=lambda: array("i"))
    digests: list[bytes] = field(default_factory=list)
    num_registered: int = 0
    """Blocks of block_table whose digests the pool has been told."""
    parent: "Sequence | None" = None
    """Completion 0 of the same request: its prompt blocks are shared when it has computed them."""
    children: "list[Sequence]" = field(default_factory=list)
    """Completions that start when this one's prompt is computed."""
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens, one still on the device included."""
        return len(self.token_ids) + self.in_flight

    @property
    def num_output(self) -> int:
        """Generated tokens, one still on the device included."""
        return len(self.token_ids) + self.in_flight - self.num_prompt

    @property
    def num_uncomputed(self) -> int:
        """Tokens to run before the next one can be sampled."""
        return len(self.token_ids) + self.in_flight - self.num_computed

    @property
    def finished(self) -> bool:
        """Whether no more tokens will be given out."""
        return self.status is Status.FINISHED

    @property
    def ready(self) -> bool:
        """Whether the next step can sample: a slow mask of its constraint may be missing."""
        return self.matcher is None or self.matcher.ready

    @property
    def at_length_limit(self) -> bool:
        """Whether the token sampled last is the last allowed one."""
        return len(self.token_ids) + self.in_flight >= self.max_total

    def update_digests(self, block_size: int) -> list[bytes]:
        """Digests of all full blocks of known tokens."""
        for i in range(len(self.digests), len(self.token_ids) // block_size):
            parent = self.digests[-1] if self.digests else ROOT_DIGEST
            block = self.token_ids[i * block_size : (i + 1) * block_size]
            self.digests.append(block_digest(parent, block))
        return self.digests
