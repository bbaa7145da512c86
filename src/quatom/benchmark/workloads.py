"""What is asked of a model under load: lengths of prompts and outputs, and when they arrive."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quatom.errors import RequestError


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests by their lengths."""

    name: str
    """As result files call it: "1024+512", or the stem of the file it was read from."""
    lengths: tuple[tuple[int, int], ...]
    """(input tokens, output tokens) of each request."""

    @property
    def input_tokens(self) -> int:
        """All prompts together."""
        return sum(length for length, _ in self.lengths)

    @property
    def output_tokens(self) -> int:
        """All outputs together."""
        return sum(length for _, length in self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest request, prompt and output."""
        return max(sum(pair) for pair in self.lengths)

    def describe(self) -> dict[str, str | int | float]:
        """The keys of a result entry; mean lengths where they differ."""
        count = len(self.lengths)
        return {
            "workload": self.name,
            "requests": count,
            "input_tokens": _exact(self.input_tokens / count),
            "output_tokens": _exact(self.output_tokens / count),
        }


def _exact(mean: float) -> int | float:
    return int(mean) if mean == int(mean) else round(mean, 1)


def fixed_lengths(requests: int, input_tokens: int, output_tokens: int) -> Workload:
    """`requests` equal requests.

    Raises:
        RequestError: a number is below 1.
    """
    if min(requests, input_tokens, output_tokens) < 1:
        raise RequestError(
            f"a workload needs at least 1 request of 1 + 1 tokens, got {requests} of "
            f"{input_tokens} + {output_tokens}"
        )
    name = f"{input_tokens}+{output_tokens}"
    return Workload(name, ((input_tokens, output_tokens),) * requests)


def read_conversations(path: Path, requests: int, *, longest: int, seed: int = 0) -> Workload:
    """`requests` different entries of a JSON list of [input tokens, output tokens], in any order.

    Entries longer than `longest` tokens together, which the model could not finish, are left out.

    Raises:
        RequestError: the file holds no such list, or too few entries that fit.
    """
    try:
        pairs = json.loads(path.read_text(encoding="utf-8"))
        lengths = [(int(prompt), int(output)) for prompt, output in pairs]
    except OSError as error:
        raise RequestError(f"cannot read conversations {path}: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise RequestError(
            f"{path} must hold a JSON list of [input tokens, output tokens] ({error})"
        ) from error
    usable = [pair for pair in lengths if min(pair) >= 1 and sum(pair) <= longest]
    if len(usable) < requests:
        raise RequestError(
            f"{path} has {len(usable)} conversations of at most {longest} tokens, {requests} were "
            "asked for: lower --num-prompts"
        )
    chosen = np.random.default_rng(seed).permutation(len(usable))[:requests]
    return Workload(path.stem, tuple(usable[i] for i in chosen))


def random_prompts(workload: Workload, vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Prompts of uniformly random token ids, so that none shares a prefix with another."""
    generator = np.random.default_rng(seed)
    return [generator.integers(vocab_size, size=n).tolist() for n, _ in workload.lengths]


def poisson_arrivals(rate: float, requests: int, seed: int = 0) -> list[float]:
    """Seconds after the start at which each request arrives: a Poisson process, the first at 0.

    Args:
        rate: requests a second on average; gaps are exponential with mean 1 / rate.

    Raises:
        RequestError: the rate is not positive.
    """
    if not rate > 0.0:
        raise RequestError(f"the request rate must be positive, got {rate}")
    gaps = np.random.default_rng(seed).exponential(1.0 / rate, size=requests - 1)
    return [0.0, *np.cumsum(gaps).tolist()]
