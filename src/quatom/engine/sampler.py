"""Logits -> token ids, for a whole batch at once, on the logits' own device.

In order: logit_bias, banned tokens (min_tokens, bad_words), the mask of structured output,
penalties, temperature; then min_p, top_k and top_p cut the distribution, and

    token = first id whose cumulative probability exceeds u * total,   u in [0, 1)

where u is a hash of the request's seed and the number of tokens that it has generated. Every step
works on rows alone, so given its logits a request's tokens do not depend on its neighbours or row.
"""

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quatom.engine.sequence import Sequence
from quatom.engine.structured.masks import TokenMask
from quatom.engine.token_rules import gather_bias
from quatom.engine.transfer import to_device

INVALID_TOKEN = -1
"""Reported instead of a token where the model's logits are not numbers."""

BIN_SHIFT = 18
"""Bits of a float32 below those that name a bin: 32 bins for each power of two."""


@dataclass(frozen=True, slots=True)
class RandomRows:
    """Rows that sample by chance, and how. R of them."""

    rows: Tensor  # (R,) int64
    temperature: Tensor  # (R, 1) float32
    uniform: Tensor  # (R, 1) float64 in [0, 1)
    min_p: Tensor | None  # (R, 1) float32; None: no row asks
    top_k: Tensor | None  # (R, 1) int64, the vocabulary's size where a row does not ask
    max_top_k: int
    top_p: Tensor | None  # (R, 1) float32


@dataclass(frozen=True, slots=True)
class Penalties:
    """Rows with penalties, P of them, and the tokens that count."""

    rows: Tensor  # (P,) int64
    factors: Tensor  # (P, 3) float32: repetition, presence, frequency
    prompt: Tensor  # (2, n) int64: index into rows, token id
    output: Tensor  # (2, m) int64


@dataclass(frozen=True, slots=True)
class SamplerInputs:
    """Everything about M rows of logits that sampling needs besides them."""

    random: RandomRows | None
    penalties: Penalties | None
    bias: tuple[Tensor, Tensor] | None  # (2, n) int64 row and token id; (n,) float32
    banned: Tensor | None  # (2, n) int64 row and token id
    num_logprobs: int | None
    """Most likely tokens to report; None: no row asks for log-probabilities."""

    @property
    def largest_alone(self) -> bool:
        """Whether all rows ask for their largest logit, as the model gives it."""
        asked = self.random, self.penalties, self.bias, self.banned, self.num_logprobs
        return all(part is None for part in asked)


@dataclass(frozen=True, slots=True)
class Sampled:
    """Chosen tokens, on the device."""

    token_ids: Tensor  # (M,) int64, always valid ids
    valid: Tensor  # (M,) bool; False where the logits are not numbers
    logprobs: Tensor | None  # (M,) float32
    top_logprobs: tuple[Tensor, Tensor] | None  # (M, k) float32 and int64


def build_inputs(
    sequences: Rows[Sequence], vocab_size: int, eos_token_ids: Rows[int], device: torch.device
) -> SamplerInputs:
    """Collect the parameters of the sequences whose rows are sampled.

    Call after the step was scheduled: a sequence's num_output counts the token to be sampled.
    """
    banned, wanted = [], None
    for row, sequence in enumerate(sequences):
        params = sequence.params
        if sequence.bad_words is not None:
            found = sequence.bad_words.banned(sequence.token_ids, sequence.num_prompt)
            banned += [(row, token_id) for token_id in found]
        if sequence.num_output <= params.min_tokens:
            stops = {*eos_token_ids, *params.stop_token_ids}
            banned += [(row, token_id) for token_id in stops]
        if params.logprobs is not None:
            wanted = max(wanted or 0, params.logprobs)
    bias = gather_bias([sequence.bias for sequence in sequences])
    return SamplerInputs(
        random=_random_rows(sequences, vocab_size, device),
        penalties=_penalties(sequences, device),
        bias=None if bias is None else (to_device(bias[0], device), to_device(bias[1], device)),
        banned=_pairs(banned, device) if banned else None,
        num_logprobs=wanted,
    )


def sample(logits: Tensor, inputs: SamplerInputs, mask: TokenMask | None = None) -> Sampled:
    """Choose a token for each row.

    Args:
        logits: (M, vocab) float32, changed in place, or 16 bits, copied where more is asked for.
        inputs: what `build_inputs` made for these rows.
        mask: the tokens that constraints allow.
    """
    logits = logits if mask is None and inputs.largest_alone else logits.float()
    raw = logits if inputs.num_logprobs is None else logits.clone()
    if inputs.bias is not None:
        logits.index_put_(tuple(inputs.bias[0]), inputs.bias[1], accumulate=True)
    if inputs.banned is not None:
        logits[inputs.banned[0], inputs.banned[1]] = -torch.inf
    if mask is not None:
        mask.forbid(logits)
    if inputs.penalties is not None:
        _apply_penalties(logits, inputs.penalties)
    token_ids = argmax_rows(logits)
    # argmax meets a NaN before any number, so the chosen logit tells whether the row is sound.
    valid = ~logits.gather(1, token_ids[:, None]).squeeze(1).isnan()
    if inputs.random is not None:
        token_ids[inputs.random.rows] = _sample_rows(logits, inputs.random)
    if inputs.num_logprobs is None:
        return Sampled(token_ids, valid, None, None)
    logprobs, top = gather_logprobs(raw, token_ids, inputs.num_logprobs)
    return Sampled(token_ids, valid, logprobs, top)


def argmax_rows(logits: Tensor) -> Tensor:  # (M, vocab) -> (M,) int64
    """Lowest index of the largest value of each row."""
    if logits.device.type == "cpu":
        # numpy's argmax is vectorized and torch's is not: 0.5 against 2.5 ms for 64 x 32000.
        return torch.from_numpy(logits.float().numpy().argmax(axis=-1))
    return logits.argmax(dim=-1)


def gather_logprobs(
    logits: Tensor,  # (M, vocab) float32
    token_ids: Tensor,  # (M,) int64
    num_top: int,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Log-probability of each token, (M,), and those of the most likely ones, two (M, num_top)."""
    normalizer = logits.logsumexp(dim=-1, keepdim=True)
    chosen = (logits.gather(1, token_ids[:, None]) - normalizer).squeeze(1)
    if not num_top:
        return chosen, None
    values, ids = logits.topk(num_top, dim=-1)
    return chosen, (values - normalizer, ids)


def uniform_from_seed(seeds: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Hash (seed, number of the token) to multiples of 2**-52 in [0, 1); uint64 in, float64 out.

    Source: the finalizer of SplitMix64 (Steele et al., 2014), applied to both in turn.
    """
    x = _mix(seeds.astype(np.uint64))
    x = _mix(x ^ counts.astype(np.uint64))
    return (x >> np.uint64(12)).astype(np.float64) * 2.0**-52


def _mix(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def _random_rows(
    sequences: Rows[Sequence], vocab_size: int, device: torch.device
) -> RandomRows | None:
    rows = [row for row, sequence in enumerate(sequences) if not sequence.params.greedy]
    if not rows:
        return None
    chosen = [sequences[row] for row in rows]
    params = [sequence.params for sequence in chosen]
    seeds = np.array([s.seed & (2**64 - 1) for s in chosen], dtype=np.uint64)
    counts = np.array([s.num_output for s in chosen], dtype=np.uint64)
    top_k = [min(p.top_k, vocab_size) if p.top_k > 0 else vocab_size for p in params]

    def column(values: Rows[float], dtype: type = np.float32) -> Tensor:
        return to_device(np.array(values, dtype=dtype)[:, None], device)

    return RandomRows(
        rows=to_device(np.array(rows, dtype=np.int64), device),
        temperature=column([p.temperature for p in params]),
        uniform=to_device(uniform_from_seed(seeds, counts)[:, None], device),
        min_p=column([p.min_p for p in params]) if any(p.min_p for p in params) else None,
        top_k=column(top_k, np.int64) if min(top_k) < vocab_size else None,
        max_top_k=max((k for k in top_k if k < vocab_size), default=0),
        top_p=column([p.top_p for p in params]) if any(p.top_p < 1.0 for p in params) else None,
    )


def _sample_rows(logits: Tensor, random: RandomRows) -> Tensor:  # -> (R,) int64
    """Cut and sample the rows that are drawn at random."""
    # Subtracting the maximum first keeps a temperature near 0 from overflowing.
    every = len(random.rows) == len(logits)
    scores = logits if every else logits[random.rows]
    scores = (scores - scores.amax(dim=-1, keepdim=True)).div_(random.temperature)
    probs = scores.softmax(dim=-1)
    if random.min_p is not None:
        probs.masked_fill_(probs < random.min_p * probs.amax(-1, keepdim=True), 0.0)
    if random.top_k is not None:
        largest = probs.topk(random.max_top_k, dim=-1).values
        floor = largest.gather(1, (random.top_k - 1).clamp(max=random.max_top_k - 1))
        asks = random.top_k <= random.max_top_k
        probs.masked_fill_((probs < floor) & asks, 0.0)
    if random.top_p is not None:
        nucleus = _histogram_floor if probs.device.type == "cpu" else _bisected_floor
        probs.masked_fill_(probs < nucleus(probs, random.top_p), 0.0)
    # In float64 the sum does not drift, and u * total stays below the last cumulative sum.
    cumulative = probs.cumsum(dim=-1, dtype=torch.float64)
    token_ids = torch.searchsorted(cumulative, random.uniform * cumulative[:, -1:], right=True)
    return token_ids.squeeze(1).clamp(max=logits.shape[1] - 1)


def _histogram_floor(probs: Tensor, top_p: Tensor) -> Tensor:  # (R, vocab), (R, 1) -> (R, 1)
    """The largest probability f such that tokens of probability f or more reach top_p of the sum.

    Non-negative floats are ordered as their bits: the upper bits are bins of a histogram, which
    says in which bin f lies, and only that bin is sorted. Sums are float64.
    """
    floors = np.empty(top_p.shape, dtype=np.float32)
    for row, (share,), floor in zip(probs.numpy(), top_p.double().tolist(), floors, strict=True):
        bins = row.view(np.uint32) >> BIN_SHIFT
        below = np.bincount(bins, weights=row).cumsum()
        dropped = below[-1] * (1.0 - share)  # the most that tokens below the floor may sum to
        edge = min(int(below.searchsorted(dropped, side="right")), len(below) - 1)
        inside = np.sort(row[bins == edge])
        sums = inside.cumsum(dtype=np.float64) + (below[edge - 1] if edge else 0.0)
        floor[0] = inside[min(int(np.count_nonzero(sums <= dropped)), len(inside) - 1)]
    return torch.from_numpy(floors)


def _bisected_floor(probs: Tensor, top_p: Tensor) -> Tensor:  # (R, vocab), (R, 1) -> (R, 1)
    """`_histogram_floor` without a sort and without waiting for the device, for GPUs.

    Bisection on the bits of a float32, which order non-negative numbers as integers do: 31 sums
    over a row.
    """
    bits = probs.contiguous().view(torch.int32)
    target = top_p * probs.sum(dim=-1, keepdim=True)
    low = torch.zeros_like(target, dtype=torch.int32)
    high = bits.amax(dim=-1, keepdim=True) + 1
    for _ in range(31):
        middle = low + (high - low) // 2
        reaches = (probs * (bits >= middle)).sum(dim=-1, keepdim=True) >= target
        low = torch.where(reaches, middle, low)
        high = torch.where(reaches, high, middle)
    return low.view(torch.float32)


def _penalties(sequences: Rows[Sequence], device: torch.device) -> Penalties | None:
    rows = [row for row, sequence in enumerate(sequences) if sequence.params.has_penalties]
    if not rows:
        return None
    prompt, output, factors = [], [], []
    for index, row in enumerate(rows):
        sequence = sequences[row]
        params = sequence.params
        factors.append(
            (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
        )
        if params.repetition_penalty != 1.0:
            prompt += [(index, t) for t in sequence.token_ids[: sequence.num_prompt]]
        output += [(index, t) for t in sequence.token_ids[sequence.num_prompt :]]
    return Penalties(
        rows=to_device(np.array(rows, dtype=np.int64), device),
        factors=to_device(np.array(factors, dtype=np.float32), device),
        prompt=_pairs(prompt, device),
        output=_pairs(output, device),
    )


def _apply_penalties(logits: Tensor, penalties: Penalties) -> None:
    scores = logits[penalties.rows]
    repetition, presence, frequency = penalties.factors.unsqueeze(2).unbind(1)  # (P, 1) each
    counts = torch.zeros_like(scores)
    ones = torch.ones_like(penalties.output[0], dtype=scores.dtype)
    counts.index_put_((penalties.output[0], penalties.output[1]), ones, accumulate=True)
    seen = counts > 0
    seen[penalties.prompt[0], penalties.prompt[1]] = True
    repeated = torch.where(scores > 0, scores / repetition, scores * repetition)
    scores = torch.where(seen, repeated, scores)
    logits[penalties.rows] = scores - frequency * counts - presence * (counts > 0)


def _pairs(pairs: list[tuple[int, int]], device: torch.device) -> Tensor:  # -> (2, n) int64
    return to_device(np.array(pairs, dtype=np.int64).reshape(-1, 2).T.copy(), device)
