"""A loaded model as lm-evaluation-harness sees one. Needs the extra `eval`.

Requests are told apart, tokenized and truncated exactly as the harness's own Hugging Face adapter
does, so that numbers compare; what differs is how they run: packed without padding, longest first,
equal inputs and equal beginnings once, and remembered on disk.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from quatom.errors import ModelError, RequestError
from quatom.evaluation.packing import (
    KV_BLOCK_SIZE,
    num_kv_blocks,
    pack,
    packed_context,
)
from quatom.evaluation.request_cache import RequestCache
from quatom.loading import LoadedModel
from quatom.quantize.calibration_data import check_token_ids

LOGIT_ROWS = 512
"""Tokens whose logits are held at once: 512 x 150k float32 are 300 MB."""

# What the harness's Hugging Face adapter generates where a task names no limit.
DEFAULT_NEW_TOKENS = 256
_LIMIT_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")

Answer = tuple[float, bool]
"""Log-likelihood of a continuation in nats, and whether greedy decoding would produce it."""


class QuatomLM(TemplateLM):
    """Adapter between the harness and `LoadedModel`."""

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        batch_tokens: int = 4096,
        cache: RequestCache | None = None,
        progress: bool = True,
    ) -> None:
        """Wrap a model that has a tokenizer.

        Args:
            batch_tokens: tokens a forward pass.
            cache: answers of earlier runs; new ones are added.
            progress: show a progress bar on stderr.

        Raises:
            ModelError: the model came without a tokenizer.
        """
        super().__init__()
        if loaded.tokenizer is None:
            raise ModelError(
                f"{loaded.source} has no tokenizer, and tasks are text: put tokenizer.json and "
                "tokenizer_config.json beside the weights"
            )
        if batch_tokens < 1:
            raise RequestError(f"batch_tokens must be at least 1, got {batch_tokens}")
        self.loaded = loaded
        self.tokenizer = loaded.tokenizer
        self.batch_tokens = batch_tokens
        self.cache = cache
        self.progress = progress
        self._device = loaded.device

    @property
    def max_length(self) -> int:
        """Tokens that fit the model."""
        return self.loaded.config.max_position

    @property
    def eot_token_id(self) -> int | None:
        """Token that ends a text, where the tokenizer has one."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Token that a text without context is conditioned on: its beginning, else its end."""
        prefix = self._prefix
        if prefix is None:
            raise ModelError(
                f"{self.loaded.source}: a task has a text without context, and the tokenizer has "
                "neither bos_token nor eos_token to begin it: name one in tokenizer_config.json"
            )
        return prefix

    @property
    def _prefix(self) -> int | None:
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids, with the tokenizer's own beginning of text unless the string brings it."""
        prefix = self._prefix
        if (
            add_special_tokens is None
            and prefix is not None
            and string.startswith(str(self.tokenizer.decode(prefix)))
        ):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        ids = self.tokenizer.encode(string, **options)
        check_token_ids(torch.tensor(ids), self.loaded.config.vocab_size, "a task's text")
        return ids

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[Answer]:
        """Log-likelihood of each (context, continuation)."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """Log-likelihood of each whole text, in windows of the model's length."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (loglikelihood, _) in zip(
            owners, self._loglikelihood_tokens(windows), strict=True
        ):
            totals[owner] += loglikelihood
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[Answer]:
        """Answers to (text, context tokens, continuation tokens)."""
        names = [
            RequestCache.request_hash("loglikelihood", context, continuation)
            for _, context, continuation in requests
        ]
        answers: dict[str, Any] = {name: self._remembered(name) for name in names}
        # Continuations of one token after the same context have the same input.
        waiting: dict[tuple[int, ...], dict[str, list[int]]] = {}
        for name, (_, context, continuation) in zip(names, requests, strict=True):
            if not continuation or len(continuation) > self.max_length:
                raise RequestError(
                    f"a continuation of {len(continuation)} tokens cannot be scored by a model of "
                    f"{self.max_length} positions"
                )
            if answers[name] is None:
                sequence = tuple((context + continuation)[-(self.max_length + 1) : -1])
                waiting.setdefault(sequence, {})[name] = continuation
        sequences = list(waiting)
        with self._bar("scoring", sum(map(len, waiting.values()))) as advance:
            computed = [max(map(len, waiting[sequence].values())) for sequence in sequences]
            for batch in pack(sequences, computed, self.batch_tokens):
                inputs = [sequences[item.index] for item in batch]
                asked = [waiting[sequence] for sequence in inputs]
                shared = [item.shared for item in batch]
                for name, answer in self._score(inputs, shared, asked).items():
                    answers[name] = answer
                    if self.cache is not None:
                        self.cache.put(name, list(answer))
                advance(sum(map(len, asked)))
        return [(answers[name][0], answers[name][1]) for name in names]

    @torch.no_grad()
    def _score(
        self,
        inputs: list[tuple[int, ...]],
        shared: list[int],
        asked: list[dict[str, list[int]]],
    ) -> dict[str, Answer]:
        """One packed forward pass; `asked` holds the continuations that end each input."""
        lengths = [len(sequence) for sequence in inputs]
        self.loaded.model.limit_length(max(lengths))
        new = [sequence[start:] for sequence, start in zip(inputs, shared, strict=True)]
        context = packed_context(shared, [len(n) for n in new], lengths, self._device, shared)
        kv_cache = self._allocate(lengths, shared)
        tokens = torch.tensor([token for sequence in new for token in sequence])
        hidden = self.loaded.model(tokens.to(self._device), context, kv_cache)

        rows: list[int] = []  # row of `hidden` that predicts each target
        targets: list[int] = []
        ends = context.cu_seqlens_q[1:].tolist()
        for end, continuations in zip(ends, asked, strict=True):
            for continuation in continuations.values():
                rows.extend(range(end - len(continuation), end))
                targets.extend(continuation)
        logprobs, greedy = self._target_scores(hidden, rows, targets)

        answers, start = {}, 0
        for continuations in asked:
            for name, continuation in continuations.items():
                span = slice(start, start + len(continuation))
                answers[name] = (float(logprobs[span].sum()), bool(greedy[span].all()))
                start = span.stop
        return answers

    def _target_scores(
        self, hidden: Tensor, rows: list[int], targets: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Log-probability (float64) and greediness of each target, on the CPU."""
        logprobs, greedy = [], []
        row = torch.tensor(rows, device=self._device)
        target = torch.tensor(targets, device=self._device)
        for chosen, wanted in zip(row.split(LOGIT_ROWS), target.split(LOGIT_ROWS), strict=True):
            scores = self.loaded.model.compute_logits(hidden[chosen]).log_softmax(-1)
            logprobs.append(scores.gather(1, wanted.unsqueeze(1)).squeeze(1).double().cpu())
            if not torch.isfinite(logprobs[-1]).all():
                raise ModelError(
                    f"{self.loaded.source}: the model gives log-probabilities that are not finite; "
                    "evaluate in --dtype float32, or check the weights"
                )
            greedy.append((scores.argmax(-1) == wanted).cpu())
        return torch.cat(logprobs), torch.cat(greedy)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Greedy text after each context, up to a stop string or the token limit."""
        names, texts, prompts, stops, limits = [], [], [], [], []
        for context, options in (request.args for request in requests):
            names.append(RequestCache.request_hash("generate_until", context, options))
            texts.append(self._remembered(names[-1]))
            stop, limit = _generation_options(options)
            stops.append(stop)
            limits.append(limit)
            if limit >= self.max_length:
                raise RequestError(
                    f"{limit} new tokens do not fit a model of {self.max_length} positions"
                )
            prompts.append(self.tok_encode(context)[limit - self.max_length :])
        todo = [i for i, text in enumerate(texts) if text is None]
        # Room is what a sequence may grow to, and nothing is shared: none of it ends before then.
        room = [range(len(prompts[i]) + limits[i]) for i in todo]
        with self._bar("generating", len(todo)) as advance:
            for batch in pack(room, [len(tokens) for tokens in room], self.batch_tokens):
                chosen = [todo[item.index] for item in batch]
                generated = self._generate(
                    [prompts[i] for i in chosen],
                    [stops[i] for i in chosen],
                    [limits[i] for i in chosen],
                )
                for i, text in zip(chosen, generated, strict=True):
                    texts[i] = text
                    if self.cache is not None:
                        self.cache.put(names[i], text)
                advance(len(chosen))
        return [text or "" for text in texts]

    @torch.no_grad()
    def _generate(
        self, prompts: list[list[int]], stops: list[list[str]], limits: list[int]
    ) -> list[str]:
        """Greedy decoding of a batch; sequences that have ended leave it."""
        capacities = [len(p) + limit for p, limit in zip(prompts, limits, strict=True)]
        self.loaded.model.limit_length(max(capacities))
        kv_cache = self._allocate(capacities)
        new: list[list[int]] = [[] for _ in prompts]
        texts = [""] * len(prompts)
        feed, starts = prompts, [0] * len(prompts)
        running = set(range(len(prompts)))
        while running:
            context = packed_context(starts, [len(f) for f in feed], capacities, self._device)
            tokens = torch.tensor([token for f in feed for token in f], device=self._device)
            hidden = self.loaded.model(tokens, context, kv_cache)
            last = context.cu_seqlens_q[1:].long() - 1
            chosen = self.loaded.model.compute_logits(hidden[last]).argmax(-1).tolist()
            for i in sorted(running):
                if chosen[i] == self.eot_token_id:
                    running.discard(i)
                    continue
                new[i].append(chosen[i])
                texts[i] = str(self.tokenizer.decode(new[i], skip_special_tokens=True))
                if len(new[i]) >= limits[i] or any(stop in texts[i] for stop in stops[i]):
                    running.discard(i)
            # Ended sequences stay in the batch and repeat their last token, so that the layout of
            # the KV cache stays as it is.
            starts = [len(p) + len(n) - 1 for p, n in zip(prompts, new, strict=True)]
            feed = [(n or p)[-1:] for p, n in zip(prompts, new, strict=True)]
        for i, stop_strings in enumerate(stops):
            for stop in stop_strings:
                texts[i] = texts[i].split(stop)[0]
        return texts

    def _allocate(self, capacities: Sequence[int], shared: Sequence[int] = ()) -> Any:
        blocks = num_kv_blocks(capacities, shared)
        return self.loaded.model.allocate_kv_cache(blocks, KV_BLOCK_SIZE)

    def _remembered(self, name: str) -> Any:
        return None if self.cache is None else self.cache.get(name)

    @contextmanager
    def _bar(self, what: str, total: int) -> Iterator[Any]:
        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(
            *columns, console=Console(stderr=True), disable=not (self.progress and total)
        ) as bar:
            task = bar.add_task(what, total=total)
            yield lambda count: bar.advance(task, count)


def _generation_options(options: dict[str, Any]) -> tuple[list[str], int]:
    """Stop strings and token limit of a generation request.

    Raises:
        RequestError: the task samples.
    """
    if options.get("do_sample") and options.get("temperature", 1.0) != 0.0:
        raise RequestError(
            f"the task samples (generation_kwargs {options}); this adapter decodes greedily only"
        )
    until = options.get("until") or []
    stops = [until] if isinstance(until, str) else list(until)
    limit = next((options[n] for n in _LIMIT_NAMES if n in options), DEFAULT_NEW_TOKENS)
    return [stop for stop in stops if stop], int(limit)
