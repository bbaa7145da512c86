"""Engine: requests in, deltas out, one step at a time.

Not thread-safe but for `make_request`: one thread owns an engine and calls everything else.
"""

import time
from collections.abc import Sequence as Layers

import torch

from quatom.arguments import checked
from quatom.engine.block_pool import BlockPool
from quatom.engine.config import EngineConfig
from quatom.engine.host_memory import keep_freed_pages
from quatom.engine.kv_cache import count_blocks
from quatom.engine.model import KVCacheLayer, ServableModel
from quatom.engine.outputs import FinishReason, SequenceDelta, TokenLogprobs
from quatom.engine.requests import Request, RequestFactory
from quatom.engine.runner import LaunchedStep, ModelRunner
from quatom.engine.sampler import INVALID_TOKEN
from quatom.engine.sampling import SamplingParams
from quatom.engine.scheduler import ScheduledSequence, ScheduledStep, Scheduler
from quatom.engine.sequence import Sequence, Status
from quatom.engine.step_graphs import StepGraphs, capture_steps
from quatom.engine.structured.compiler import CompiledConstraint
from quatom.engine.structured.masks import wait_for_any
from quatom.errors import EngineError, QueueFullError, RequestError
from quatom.recipe import Recipe

MASK_WAIT_SECONDS = 0.05
"""How long a step waits that has nothing to run but sequences whose masks are missing."""


class Engine:
    """Continuous batching of requests on one model."""

    @checked(EngineError, but=("loaded",))
    def __init__(self, loaded: ServableModel, config: EngineConfig | None = None) -> None:
        self.device, limits = loaded.device, config or EngineConfig()
        self.config = limits.resolve(self.device, loaded.config.max_position)
        if self.config.keep_freed_memory:
            keep_freed_pages()
        self.recipe: Recipe = loaded.recipe
        self.model_config = loaded.config
        self.tokenizer = loaded.tokenizer
        self.max_model_len = self.config.max_model_len or loaded.config.max_position
        loaded.model.limit_length(self.max_model_len)
        self.requests = RequestFactory(loaded.config, loaded.tokenizer, self.max_model_len)
        num_blocks = count_blocks(
            loaded.model,
            self.config,
            self.max_model_len,
            self.device,
            lambda: self._run_largest_step(loaded),
        )
        kv_cache = loaded.model.allocate_kv_cache(num_blocks, self.config.block_size)
        self.kv_cache_bytes = num_blocks * sum(layer.bytes_per_block for layer in kv_cache)
        self.pool = BlockPool(num_blocks, prefix_caching=self.config.prefix_caching)
        self.scheduler = Scheduler(self.config, self.pool)
        graphs = capture_steps(loaded.model, kv_cache, self.config, self.max_model_len, self.device)
        self.runner = self._make_runner(loaded, kv_cache, graphs)
        self._running: dict[str, list[Sequence]] = {}
        self._launched: LaunchedStep | None = None

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self.scheduler.has_work or self._launched is not None

    def make_request(
        self,
        request_id: str,
        prompt_ids: list[int],
        params: SamplingParams,
        constraint: CompiledConstraint | None = None,
    ) -> Request:
        """Check a request and build its sequences; see `RequestFactory.make`."""
        return self.requests.make(request_id, prompt_ids, params, constraint)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            QueueFullError: as many sequences wait as config.max_waiting allows.
            RequestError: a request of this id is running.
        """
        limit = self.config.max_waiting
        if limit is not None and len(self.scheduler.waiting) >= limit:
            raise QueueFullError(
                f"{len(self.scheduler.waiting)} requests are waiting, the limit is {limit}; "
                "try again later"
            )
        if request.request_id in self._running:
            raise RequestError(f"a request with id {request.request_id!r} is already running")
        self._running[request.request_id] = request.sequences
        self.scheduler.add(request.sequences[0])

    def add_request(self, request_id: str, prompt_ids: list[int], params: SamplingParams) -> None:
        """`make_request` and `add` in one."""
        self.add(self.make_request(request_id, prompt_ids, params))

    def abort(self, request_id: str) -> None:
        """Stop a request and free its blocks at once; an unknown id is no error."""
        for sequence in self._running.pop(request_id, ()):
            if not sequence.finished:
                self.scheduler.finish(sequence, "abort")

    def step(self) -> list[SequenceDelta]:
        """Run one step. With overlap, the deltas are those of the step launched before.

        Raises:
            EngineError: nothing can run although requests wait.
        """
        deltas: list[SequenceDelta] = []
        if self._launched is not None and self.scheduler.needs_known_tokens:
            deltas += self._collect()
        launched = self._launch()
        if self._launched is not None:
            deltas += self._collect()
        self._launched = launched
        if launched is not None and not self.config.overlap:
            deltas += self._collect()
        return deltas

    def fail_running(self, error: str) -> list[SequenceDelta]:
        """End every running sequence after a step that raised; waiting ones are kept.

        The contents of the KV cache are no longer trusted, so known prefixes are forgotten.
        """
        self._launched = None
        deltas = [self._fail(sequence, error) for sequence in [*self.scheduler.running]]
        self.pool.forget_prefixes()
        return deltas

    def check_accounting(self) -> None:
        """Assert that no KV block is lost.

        Raises:
            EngineError: reference counts do not match the block tables.
        """
        self.pool.check(self.scheduler.held_blocks())

    def _launch(self) -> LaunchedStep | None:
        step = self.scheduler.schedule()
        if not step.items:
            if self.scheduler.waiting and not self.scheduler.running and self._launched is None:
                waiting = self.scheduler.waiting[0]
                raise EngineError(
                    f"request {waiting.request_id} of {waiting.num_tokens} tokens does not fit "
                    f"into {self.pool.num_free} free KV blocks of {self.config.block_size} tokens"
                )
            if self._launched is None:  # else there are tokens to collect meanwhile
                wait_for_any((s.matcher for s in self.scheduler.running), MASK_WAIT_SECONDS)
            return None
        now = time.monotonic()
        for item in step.items:
            if item.sequence.times.scheduled is None:
                item.sequence.times.scheduled = now
        return self.runner.launch(step)

    def _collect(self) -> list[SequenceDelta]:
        """Read a launched step's tokens back and hand them to their sequences."""
        step, self._launched = self._launched, None
        assert step is not None
        tokens, now = step.wait(), time.monotonic()
        deltas = []
        for row, (sequence, token_id) in enumerate(zip(step.sampled, tokens, strict=True)):
            sequence.in_flight -= 1
            if not sequence.finished:  # it may have been aborted, or have ended a step ago
                logprobs = None if step.logprobs is None else step.token_logprobs(row, token_id)
                delta = self._append(sequence, token_id, logprobs, now)
                delta.hidden = step.last_hidden(row)
                deltas.append(delta)
        for item in step.items:
            self.scheduler.computed(item.sequence)
        return deltas

    def _append(
        self, sequence: Sequence, token_id: int, logprobs: TokenLogprobs | None, now: float
    ) -> SequenceDelta:
        if token_id == INVALID_TOKEN:
            return self._fail(sequence, "the model's logits are not numbers")
        if sequence.matcher is not None and not sequence.matcher.accept(token_id):
            return self._fail(sequence, sequence.matcher.error, refused=True)
        first, before = sequence.times.first_token is None, sequence.times.last_token
        sequence.times.last_token = now
        if first:
            sequence.times.first_token = now
        scored = sequence.params.max_tokens == 0  # the prompt alone: this token is dropped
        reason: FinishReason | None = "length"
        text = ""
        if not scored:
            sequence.token_ids.append(token_id)
            reason, text = self._check_end(sequence, token_id)
        delta = SequenceDelta(
            request_id=sequence.request_id,
            index=sequence.index,
            token_ids=() if scored else (token_id,),
            text=text,
            logprobs=() if scored or logprobs is None else (logprobs,),
            prompt_logprobs=tuple(sequence.prompt_logprobs)
            if first and sequence.params.prompt_logprobs is not None
            else None,
            num_cached=sequence.num_cached,
            num_prompt=sequence.num_prompt,
            num_generated=len(sequence.token_ids) - sequence.num_prompt,
            interval=None if before is None else now - before,
            finish_reason=reason,
            stop_reason=sequence.stop_reason,
            times=sequence.times,
        )
        if reason is not None:
            self._finish(sequence, reason)
            computed = sequence.num_prompt - sequence.num_cached  # a preempted one wrote them twice
            delta.num_cache_written = min(sequence.num_cache_written, computed)
        return delta

    def _check_end(self, sequence: Sequence, token_id: int) -> tuple[FinishReason | None, str]:
        """Whether the token just appended is the last, and the text that may be shown now."""
        params, text, detokenizer = sequence.params, "", sequence.detokenizer
        reason: FinishReason | None = None
        ends = token_id in self.model_config.eos_token_ids and not params.ignore_eos
        if ends or token_id in params.stop_token_ids:
            reason = "stop"
            if not ends:
                sequence.stop_reason = token_id
        visible = reason is None or (not ends and params.include_stop_str_in_output)
        if detokenizer is not None and visible:
            # A token in flight does not count: whether there is one depends on the engine's steps.
            generated = len(sequence.token_ids) - sequence.num_prompt
            text, hit = detokenizer.append(token_id, find_stop=generated > params.min_tokens)
            if hit is not None:
                sequence.stop_reason, reason = hit, "stop"
        if reason is None and sequence.matcher is not None and sequence.matcher.terminated:
            reason = "stop"
        if reason is None and len(sequence.token_ids) >= sequence.max_total:
            reason = "length"
        if reason is not None and detokenizer is not None:
            text += detokenizer.finish()
        return reason, text

    def _fail(self, sequence: Sequence, error: str, *, refused: bool = False) -> SequenceDelta:
        self._finish(sequence, "error")
        return SequenceDelta(
            request_id=sequence.request_id,
            index=sequence.index,
            token_ids=(),
            text="",
            finish_reason="error",
            error=error,
            refused=refused,
            times=sequence.times,
        )

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        if reason != "error":
            self.scheduler.computed(sequence)  # its full blocks outlive it as a known prefix
        self.scheduler.finish(sequence, reason)
        siblings = self._running.get(sequence.request_id)
        if siblings is not None and all(s.status is Status.FINISHED for s in siblings):
            del self._running[sequence.request_id]

    def _make_runner(
        self,
        loaded: ServableModel,
        kv_cache: Layers[KVCacheLayer],
        graphs: StepGraphs | None = None,
    ) -> ModelRunner:
        return ModelRunner(
            loaded.model,
            kv_cache,
            self.config,
            vocab_size=loaded.config.vocab_size,
            eos_token_ids=loaded.config.eos_token_ids,
            device=self.device,
            graphs=graphs,
        )

    def _run_largest_step(self, loaded: ServableModel) -> None:
        """One prefill of max_num_batched_tokens tokens and logits for max_num_seqs rows."""
        length = min(self.config.max_num_batched_tokens, self.max_model_len - 1)
        blocks = -(-length // self.config.block_size)
        params = SamplingParams(max_tokens=1)
        sequence = self.make_request("warm-up", [0] * length, params).sequences[0]
        sequence.block_table.extend(range(blocks))
        kv_cache = loaded.model.allocate_kv_cache(blocks, self.config.block_size)
        runner = self._make_runner(loaded, kv_cache)
        item = ScheduledSequence(sequence, 0, length, samples=True)
        runner.launch(ScheduledStep(items=[item], num_tokens=length)).wait()
        shape = (self.config.max_num_seqs, loaded.config.hidden_size)
        hidden = torch.zeros(shape, dtype=loaded.dtype, device=self.device)
        loaded.model.compute_logits(hidden).softmax(dim=-1)
