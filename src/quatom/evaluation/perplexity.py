"""Perplexity by GPTQ's protocol: exp of the mean token loss over non-overlapping windows.

The whole text is tokenized at once, cut into windows of `sequence_length` tokens (the tail is
dropped), and each window is scored from position 0; its first token has no prediction. The keys
and values of a window pass through the paged KV cache, so that a quantized cache counts.

Source: GPTQ (Frantar et al., ICLR 2023), evaluation; used unchanged by Atom and its peers.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, cast

import torch
from torch import Tensor

from quatom.arguments import Range, checked
from quatom.errors import CalibrationError
from quatom.evaluation.divergence import Divergence, DivergenceMeter, check_same_vocabulary
from quatom.loading import LoadedModel
from quatom.modeling.block import DecoderBlock
from quatom.modeling.context import full_sequences_context
from quatom.quantize.calibration_data import check_text, check_token_ids
from quatom.quantize.statistics import run_block

KV_BLOCK_SIZE = 64
LOGIT_ROWS = 512
"""Tokens whose logits are held at once: 512 x 150k float32 are 300 MB."""


@dataclass(frozen=True, slots=True)
class Perplexity:
    """A perplexity and what it was measured on."""

    perplexity: float
    sequence_length: int
    windows: int
    all_windows: bool
    """Whether the whole text was scored."""
    seconds: float
    divergence: Divergence | None = None
    """From the reference, where there was one."""


def cut_windows(
    tokens: Tensor,  # (tokens,) int64
    sequence_length: int,
    max_windows: int | None = None,
) -> Tensor:
    """The first windows of a tokenized text, (windows, sequence_length).

    Raises:
        CalibrationError: the text has fewer tokens than one window.
    """
    count = tokens.numel() // sequence_length
    if count == 0:
        raise CalibrationError(
            f"the text has {tokens.numel()} tokens, fewer than one window of {sequence_length}: "
            "give a longer text or a smaller --sequence-length"
        )
    if max_windows is not None:
        count = min(count, max_windows)
    return tokens[: count * sequence_length].view(count, sequence_length)


@torch.no_grad()
def window_loss(loaded: LoadedModel, window: Tensor) -> float:  # (length,)
    """Mean loss of the window's tokens but the first, in nats."""
    window = window.to(loaded.device)
    return mean_loss(_hidden(loaded, window), window, loaded.model.compute_logits)


def _hidden(loaded: LoadedModel, window: Tensor) -> Tensor:  # (length,) -> (length, hidden)
    context = full_sequences_context(1, window.numel(), KV_BLOCK_SIZE, loaded.device)
    cache = loaded.model.allocate_kv_cache(context.block_tables.numel(), KV_BLOCK_SIZE)
    hidden: Tensor = loaded.model(window, context, cache)
    return hidden


@torch.no_grad()
def _both_logits(
    loaded: LoadedModel, reference: LoadedModel, window: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of every token of a window but the last, in pieces, of both models on one device.

    With each piece come the tokens that it predicts.
    """
    window = window.to(loaded.device)
    own, other = _hidden(loaded, window), _hidden(reference, window)
    for rows in _pieces(window.numel() - 1):
        logits = loaded.model.compute_logits(own[rows])
        yield logits, reference.model.compute_logits(other[rows]), window[1:][rows]


def _pieces(tokens: int) -> Iterator[slice]:
    """Rows of at most LOGIT_ROWS tokens."""
    for start in range(0, tokens, LOGIT_ROWS):
        yield slice(start, min(start + LOGIT_ROWS, tokens))


def mean_loss(
    hidden: Tensor,  # (length, hidden) after the final norm
    window: Tensor,  # (length,) int64
    compute_logits: Callable[[Tensor], Tensor],
) -> float:
    """Mean cross-entropy of predicting each token of the window from those before it."""
    last = window.numel() - 1
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    for rows in _pieces(last):
        logits = compute_logits(hidden[rows])
        targets = window[rows.start + 1 : rows.stop + 1]
        total += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").double()
    return float(total) / last


def perplexity_of(losses: Sequence[float]) -> float:
    """Exp of the mean of losses in nats.

    Raises:
        CalibrationError: it is not finite.
    """
    mean = math.fsum(losses) / len(losses)
    if not mean < math.log(sys.float_info.max):
        raise CalibrationError(
            f"the mean loss is {mean:.6g} nats, whose exponential no number holds: the weights are "
            "damaged, or the computation overflows (evaluate in --dtype float32)"
        )
    return math.exp(mean)


@torch.no_grad()
def _where_not_finite(loaded: LoadedModel, window: Tensor) -> str:
    """The first block whose output is not finite, found by running the window once more."""
    model, window = loaded.model, window.to(loaded.device)
    positions = torch.arange(window.numel(), device=loaded.device)
    hidden = model.embed(window, positions).unsqueeze(0)
    where = "all blocks give finite values, the output head does not"
    for index, block in enumerate(model.blocks):
        hidden = run_block(cast("DecoderBlock", block), hidden, model.rotary)
        odd = hidden[~torch.isfinite(hidden)]
        if odd.numel():
            where = f"block {index} gives {odd[0].item()}"
            break
    return f"{where}; evaluate in --dtype float32, or check the weights"


@checked()
def measure_perplexity(
    loaded: LoadedModel,
    tokens: Tensor,
    *,
    sequence_length: int = 2048,
    max_windows: Annotated[int, Range(1)] | None = None,
    reference: LoadedModel | None = None,
    on_window: Callable[[int, int, float], None] | None = None,
) -> Perplexity:
    """Perplexity of a model on a text.

    Args:
        loaded: the model.
        tokens: the whole tokenized text, (tokens,) of an integer dtype.
        sequence_length: tokens per window.
        max_windows: score only the first ones.
        reference: a model of the same vocabulary on the same device, to compare predictions with.
        on_window: called after each window with (windows done, windows in all, perplexity so far).

    Raises:
        ArgumentError: an argument is of another kind than it says here.
        CalibrationError: the text is shorter than a window, or the model's context than a window;
            the model does not know a token, or gives values that are not finite; the reference
            knows other tokens.
    """
    if not 2 <= sequence_length <= loaded.config.max_position:
        raise CalibrationError(
            f"windows of {sequence_length} tokens do not fit a model of "
            f"{loaded.config.max_position} positions: choose --sequence-length from 2 to that"
        )
    check_text(tokens)
    windows = cut_windows(tokens.to(torch.int64), sequence_length, max_windows)
    if reference is not None:
        check_same_vocabulary(loaded, reference)
        reference.model.limit_length(sequence_length)
    meter = DivergenceMeter()
    loaded.model.limit_length(sequence_length)
    check_token_ids(windows, loaded.config.vocab_size, "the text")
    started = time.perf_counter()
    losses: list[float] = []
    for number, window in enumerate(windows, 1):
        losses.append(window_loss(loaded, window))
        if not math.isfinite(losses[-1]):
            raise CalibrationError(
                f"the loss of window {number} of {len(windows)} is {losses[-1]}: "
                f"{_where_not_finite(loaded, window)}"
            )
        if reference is not None:
            meter.add(_both_logits(loaded, reference, window))
        if on_window is not None:
            on_window(number, len(windows), perplexity_of(losses))
    return Perplexity(
        perplexity=perplexity_of(losses),
        sequence_length=sequence_length,
        windows=len(losses),
        all_windows=len(losses) == tokens.numel() // sequence_length,
        seconds=time.perf_counter() - started,
        divergence=None if reference is None else meter.result(),
    )
