"""Scheduler: which sequences run in the next step, and on which KV blocks.

A step is a mixture. First every decoding sequence runs its one token, then prompts that are partly
computed go on, then waiting sequences are admitted, all in order of arrival and within a budget of
tokens. Three rules keep this fair and live:

- A sequence is admitted with the blocks of all its tokens, or not at all, and only if the blocks
  are expected to suffice until all running sequences have ended (`DemandForecast`).
- A decode that finds no free block takes them from the sequence that arrived last, which goes back
  to the head of the queue and is recomputed later. So the oldest sequence always advances.
- While several prompts wait, each gets at most `max_prefill_chunk` tokens of a step.
"""

from bisect import insort
from collections import deque
from dataclasses import dataclass, field

from quatom.engine.block_pool import BlockPool
from quatom.engine.config import EngineConfig
from quatom.engine.forecast import DemandForecast
from quatom.engine.outputs import FinishReason
from quatom.engine.sequence import Sequence, Status

WATERMARK = 0.01
"""Share of blocks that admission leaves free, so that running sequences can grow for a while."""


@dataclass(slots=True)  # one per token: frozen would double the time to make it
class ScheduledSequence:
    """Tokens start to start + count of a sequence run in this step."""

    sequence: Sequence
    start: int
    count: int
    samples: bool
    """Whether these are its last tokens, so that the step samples the next one."""


@dataclass(slots=True)
class ScheduledStep:
    """What the next step runs."""

    items: list[ScheduledSequence] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    """(source, target) KV blocks to copy before the step; no block is in both columns."""
    num_tokens: int = 0


class Scheduler:
    """The queue, the running sequences and their blocks."""

    def __init__(self, config: EngineConfig, pool: BlockPool) -> None:
        assert config.max_prefill_chunk is not None
        self.config = config  # resolved
        self.pool = pool
        self._prefill_chunk = config.max_prefill_chunk
        self._forecast = DemandForecast(config.block_size)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of arrival
        self.reset_counters()

    def reset_counters(self) -> None:
        """Count anew, as if nothing had run."""
        self.num_preemptions = 0
        self.prefix_queries = 0
        self.prefix_hits = 0

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished."""
        return bool(self.waiting or self.running)

    @property
    def needs_known_tokens(self) -> bool:
        """Whether some running sequence cannot be scheduled before its last token is read back."""
        return any(sequence.params.needs_known_tokens for sequence in self.running)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self.waiting.append(sequence)

    def schedule(self) -> ScheduledStep:
        """Choose the next step and count its tokens as computed; no items: nothing can run."""
        step = ScheduledStep()
        preempted = self._schedule_decodes(step)
        self._schedule_prefills(step)
        if not preempted:
            self._admit_waiting(step)
        # A source may be handed out again only now, so that no copy of this step targets it.
        self.pool.release(source for source, _ in step.copies)
        return step

    def computed(self, sequence: Sequence) -> None:
        """A launched step computed tokens of `sequence`: offer its full blocks for reuse."""
        if sequence.status is not Status.RUNNING:
            return
        sequence.num_launched = sequence.num_computed
        block_size = self.config.block_size
        full = min(sequence.num_computed, len(sequence.token_ids)) // block_size
        if full > sequence.num_registered and self.pool.prefix_caching:
            digests = sequence.update_digests(block_size)
            for i in range(sequence.num_registered, full):
                new = self.pool.register(sequence.block_table[i], digests[i])
                if new and (i + 1) * block_size <= sequence.num_prompt:
                    sequence.num_cache_written += block_size
            sequence.num_registered = full
        if sequence.children and sequence.num_launched >= sequence.num_prompt:
            self.release_children(sequence)

    def release_children(self, sequence: Sequence) -> None:
        """Queue the completions that waited for this one's prompt, ahead of younger requests."""
        self.waiting.extendleft(reversed(sequence.children))
        sequence.children = []

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """Take a sequence out and give its blocks back."""
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
            self._release_blocks(sequence)
        elif sequence.status is Status.WAITING and sequence in self.waiting:
            self.waiting.remove(sequence)
        if reason in ("stop", "length"):
            self._forecast.observe(sequence)
        sequence.status = Status.FINISHED
        sequence.finish_reason = reason
        if sequence.children:
            self.release_children(sequence)

    def held_blocks(self) -> list[int]:
        """Every block table entry, for `BlockPool.check`."""
        return [block for sequence in self.running for block in sequence.block_table]

    def _schedule_decodes(self, step: ScheduledStep) -> bool:
        """Returns whether a sequence was preempted."""
        preempted = False
        i = 0
        while i < len(self.running):
            sequence = self.running[i]
            decodes = sequence.num_uncomputed == 1 and not sequence.at_length_limit
            if decodes and sequence.ready:
                while not self._grow(sequence, step):
                    self._preempt(self.running[-1])
                    preempted = True
                    if sequence.status is Status.WAITING:
                        return preempted
                self._take(step, sequence, 1)
            i += 1
        return preempted

    def _schedule_prefills(self, step: ScheduledStep) -> None:
        prefilling = [s for s in self.running if s.num_uncomputed > 1]
        crowded = len(prefilling) + len(self.waiting) > 1
        for sequence in prefilling:
            self._take_prefill(step, sequence, crowded)

    def _admit_waiting(self, step: ScheduledStep) -> None:
        crowded = len(self.waiting) > 1 or any(s.num_uncomputed > 1 for s in self.running)
        budget = self.config.max_num_batched_tokens
        while (
            self.waiting
            and len(self.running) < self.config.max_num_seqs
            and step.num_tokens < budget
            and self._allocate(self.waiting[0], step)
        ):
            sequence = self.waiting.popleft()
            sequence.status = Status.RUNNING
            insort(self.running, sequence, key=lambda s: s.order)
            self._take_prefill(step, sequence, crowded)

    def _take_prefill(self, step: ScheduledStep, sequence: Sequence, crowded: bool) -> None:
        count = min(
            sequence.num_uncomputed,
            self.config.max_num_batched_tokens - step.num_tokens,
            self._prefill_chunk if crowded else self.config.max_num_batched_tokens,
        )
        if count > 0:
            self._take(step, sequence, count)

    def _take(self, step: ScheduledStep, sequence: Sequence, count: int) -> None:
        samples = count == sequence.num_uncomputed
        item = ScheduledSequence(sequence, sequence.num_computed, count, samples)
        step.items.append(item)
        step.num_tokens += count
        sequence.num_computed += count
        sequence.in_flight += samples

    def _grow(self, sequence: Sequence, step: ScheduledStep) -> bool:
        """Make room for one more token. False: no block is free.

        The last block is this sequence's own: whoever shared it took a copy when admitted.
        """
        index = sequence.num_computed // self.config.block_size
        if index == len(sequence.block_table):
            if not self.pool.num_free:
                return False
            sequence.block_table.append(self.pool.allocate())
        return True

    def _copy(self, block: int, step: ScheduledStep) -> int:
        """A private copy of a block; our hold on the source lasts until the step is scheduled."""
        target = self.pool.allocate()
        step.copies.append((block, target))
        return target

    def _allocate(self, sequence: Sequence, step: ScheduledStep) -> bool:
        """Give a waiting sequence the blocks of all its tokens. False: it must wait."""
        block_size = self.config.block_size
        shared, computed = self._find_prefix(sequence)
        total = -(-sequence.num_tokens // block_size)
        copy = computed < len(shared) * block_size  # its next token is written into a shared block
        needed = total - len(shared) + copy + self.pool.num_unheld(shared)
        reserve = int(WATERMARK * self.pool.num_blocks) if self.running else 0
        if needed + reserve > self.pool.num_free:
            return False
        if self.running and self.config.forecast_admission:
            used = self.pool.num_blocks - self.pool.num_free + needed
            peak = self._forecast.peak_blocks([*self.running, sequence], used)
            if peak + reserve > self.pool.num_blocks:
                return False
        for block in shared:
            self.pool.hold(block)
        sequence.block_table.extend(shared)
        if copy:
            sequence.block_table[-1] = self._copy(shared[-1], step)
        sequence.block_table.extend(self.pool.allocate() for _ in range(total - len(shared)))
        sequence.num_computed = computed
        if sequence.num_output == 0:
            sequence.num_cached = computed
            self.prefix_queries += sequence.num_prompt
            self.prefix_hits += computed
        return True

    def _find_prefix(self, sequence: Sequence) -> tuple[list[int], int]:
        """Blocks that already hold the start of a sequence, and how many of its tokens they save.

        At least one token is left to run: its hidden state makes the logits of the next one.
        """
        block_size = self.config.block_size
        parent = sequence.parent
        if (
            parent is not None
            and sequence.num_output == 0
            and parent.num_launched >= sequence.num_prompt
        ):
            computed = sequence.num_prompt - 1
            return list(parent.block_table[: -(-computed // block_size)]), computed
        wanted = sequence.params.prompt_logprobs
        if wanted is not None and len(sequence.prompt_logprobs) < sequence.num_prompt - 1:
            return [], 0  # every prompt token must run to have its logits
        if not self.pool.prefix_caching:
            return [], 0
        shared = self.pool.match(sequence.update_digests(block_size))
        computed = min(len(shared) * block_size, sequence.num_tokens - 1)
        return shared[: -(-computed // block_size)], computed

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release_blocks(sequence)
        sequence.status = Status.WAITING
        sequence.num_computed = 0
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _release_blocks(self, sequence: Sequence) -> None:
        self.pool.release(reversed(sequence.block_table))
        del sequence.block_table[:]
        sequence.num_registered = sequence.num_launched = 0
