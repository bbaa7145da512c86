"""Agreement: does a fast backend choose the tokens that the reference chooses?

The reference generates greedily and its choices are recorded. Another device or backend is then
fed exactly those tokens, one decode step at a time through the engine (paged cache, CUDA graphs
and all), and says at each position what it would have chosen. Differences of log-probability at
the recorded tokens are the noise between the two; a different choice is explained by noise where
the reference itself saw the two best tokens closer together than that.
"""

import json
from collections.abc import Sequence as Rows
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from quatom.engine.config import EngineConfig
from quatom.engine.engine import Engine
from quatom.engine.llm import LLM
from quatom.engine.outputs import SequenceDelta, TokenLogprobs
from quatom.engine.sampling import SamplingParams
from quatom.engine.sequence import Sequence
from quatom.errors import CheckpointError, EngineError
from quatom.json_text import parse_json
from quatom.loading import LoadedModel

NOISE_PERCENTILE = 99.0
"""The noise of a logit difference is this percentile of the differences seen, twice: two move."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """Greedy choices of one model after P prompts, n tokens each."""

    model: str
    recipe: str
    backend: str
    prompts: list[list[int]]
    tokens: list[list[int]]  # (P, n)
    logprobs: list[list[float]]  # (P, n), of those tokens
    gaps: list[list[float]]  # (P, n), log-probability of the best token less the second best

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "Choices":
        """What `save` wrote.

        Raises:
            CheckpointError: the file is something else.
        """
        try:
            choices = cls(**parse_json(path.read_text(encoding="utf-8")))
            choices._check_rows()
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path} holds no recorded choices: {error}; record them with --record"
            ) from error
        return choices

    def check_tokens(self, vocab_size: int) -> None:
        """Raise CheckpointError if a model of so many tokens cannot have been recorded."""
        largest = max(max(row) for row in (*self.prompts, *self.tokens))
        if largest >= vocab_size:
            raise CheckpointError(
                f"the recorded choices have token id {largest}, and the model has {vocab_size} "
                f"tokens: they are of another model, {self.model}"
            )

    def _check_rows(self) -> None:
        """Raise ValueError unless there are P prompts and P rows of n entries of each kind."""
        count = len(self.prompts)
        for name, rows in (
            ("tokens", self.tokens),
            ("logprobs", self.logprobs),
            ("gaps", self.gaps),
        ):
            lengths = {len(row) for row in rows}
            if len(rows) != count or len(lengths) != 1 or 0 in lengths:
                raise ValueError(f"{name} are not {count} rows of one length")
        for row in (*self.prompts, *self.tokens):
            if not row or not all(type(token) is int and token >= 0 for token in row):
                raise ValueError("a row holds something else than token ids")
        for numbers in (*self.logprobs, *self.gaps):
            if not all(type(value) in (int, float) for value in numbers):
                raise ValueError("a row holds something else than numbers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How the choices of a second run compare with recorded ones."""

    positions: int
    agreeing: int
    noise: float
    """Twice the NOISE_PERCENTILE of |difference| of the recorded tokens' log-probabilities."""
    largest_difference: float
    unexplained: int
    """Differing choices where the reference's gap between its two best tokens exceeds the noise."""
    mean_gap: float
    """Reference gap at the differing choices, on average; 0 where all agree."""
    largest_gap: float
    """The largest of them."""
    repeatable: bool
    """Whether the second run, done twice, made the same choices."""

    @property
    def share(self) -> float:
        """Of positions that agree."""
        return self.agreeing / self.positions


def cut_prompts(tokens: Rows[int], count: int, length: int) -> list[list[int]]:
    """`count` prompts of `length` tokens, spread evenly over a text.

    Raises:
        EngineError: the text is too short for that.
    """
    if len(tokens) < count * length:
        raise EngineError(
            f"{count} prompts of {length} tokens need {count * length} tokens of text, there are "
            f"{len(tokens)}: give a longer file or fewer prompts"
        )
    stride = len(tokens) // count
    return [list(tokens[i * stride : i * stride + length]) for i in range(count)]


def record_choices(
    loaded: LoadedModel, prompts: list[list[int]], num_tokens: int, config: EngineConfig
) -> Choices:
    """Generate `num_tokens` tokens after each prompt, greedily, and keep how sure each was."""
    llm = LLM.from_engine(Engine(loaded, config))
    outputs = llm.generate(prompts, _params(num_tokens))
    steps = [output.outputs[0].logprobs or [] for output in outputs]
    return Choices(
        model=loaded.source,
        recipe=loaded.recipe.name,
        backend=loaded.backend_name,
        prompts=prompts,
        tokens=[output.token_ids for output in outputs],
        logprobs=[[step.logprob for step in row] for row in steps],
        gaps=[[step.top[0][1] - step.top[1][1] for step in row] for row in steps],
    )


def compare_choices(loaded: LoadedModel, recorded: Choices, config: EngineConfig) -> Agreement:
    """Feed recorded tokens to `loaded` and compare its own choices with them."""
    engine = _FedEngine(loaded, replace(config, overlap=False))
    choices, logprobs = engine.feed(recorded)
    again, _ = engine.feed(recorded)
    tokens, gaps = np.array(recorded.tokens), np.array(recorded.gaps)
    difference = np.abs(logprobs - np.array(recorded.logprobs))
    noise = 2.0 * float(np.percentile(difference, NOISE_PERCENTILE))
    differs = choices != tokens
    return Agreement(
        positions=tokens.size,
        agreeing=int((~differs).sum()),
        noise=noise,
        largest_difference=float(difference.max()),
        unexplained=int((gaps[differs] > noise).sum()),
        mean_gap=float(gaps[differs].mean()) if differs.any() else 0.0,
        largest_gap=float(gaps[differs].max(initial=0.0)),
        repeatable=bool((choices == again).all()),
    )


def agreement_entry(
    loaded: LoadedModel, recorded: Choices, measured: Agreement, model: str
) -> dict[str, Any]:
    """One entry of an agreement-MACHINE.json."""
    return {
        "model": model,
        "recipe": loaded.recipe.name,
        "backend": loaded.backend_name,
        "device": loaded.device.type,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "reference_backend": recorded.backend,
        "prompts": len(recorded.prompts),
        "tokens_each": len(recorded.tokens[0]),
        "share": measured.share,
        **asdict(measured),
    }


def _params(num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, logprobs=2)


class _FedEngine(Engine):
    """An engine that goes on with recorded tokens, whatever the model chose."""

    def feed(self, recorded: Choices) -> tuple[np.ndarray, np.ndarray]:
        """Choices (P, n) of this model and its log-probabilities (P, n) of the recorded tokens."""
        self._recorded = {str(i): row for i, row in enumerate(recorded.tokens)}
        self._choices: dict[str, list[int]] = {key: [] for key in self._recorded}
        self._logprobs: dict[str, list[float]] = {key: [] for key in self._recorded}
        for i, prompt in enumerate(recorded.prompts):
            self.add_request(str(i), prompt, _params(len(recorded.tokens[i])))
        while self.has_work:
            for delta in self.step():
                if delta.error is not None:
                    raise EngineError(f"prompt {delta.request_id}: {delta.error}")
        keys = list(self._recorded)
        return (
            np.array([self._choices[key] for key in keys]),
            np.array([self._logprobs[key] for key in keys]),
        )

    def _append(
        self, sequence: Sequence, token_id: int, logprobs: TokenLogprobs | None, now: float
    ) -> SequenceDelta:
        key = sequence.request_id
        fed = self._recorded[key][len(self._choices[key])]
        self._choices[key].append(token_id)
        self._logprobs[key].append(_logprob_of(fed, logprobs))
        return super()._append(sequence, fed, logprobs, now)


def _logprob_of(token_id: int, logprobs: TokenLogprobs | None) -> float:
    """Log-probability of a token; of the second best where it is not among the reported."""
    if logprobs is None:
        raise EngineError("the model's logits are not numbers")
    return dict(logprobs.top).get(token_id, logprobs.top[-1][1])
