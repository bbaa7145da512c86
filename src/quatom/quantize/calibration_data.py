"""Token sequences to measure statistics on, sampled from text, conversations or a hub data set."""

import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quatom.checkpoint.chat import render_chat
from quatom.checkpoint.contents import exists
from quatom.errors import CalibrationError, ModelError
from quatom.quantize.text_files import check_characters, is_rows, read_rows, read_text, text_of
from quatom.recipe import CalibrationSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

# ORGANIZATION/NAME, then the configuration and the split where they are not the only ones.
_DATASET = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]*))?(?::([\w.-]+))?")
_SURPLUS = 8
"""A data set is read until it gave this many times the tokens that are sampled."""
_MANY_READINGS = 8
"""Readings of each token, on average, that are a warning."""


def tokenize(text: str, tokenizer: "PreTrainedTokenizerBase") -> Tensor:
    """All tokens of a text, (tokens,) int64, with the tokenizer's own beginning-of-text token."""
    # Longer than the model's context on purpose: windows are cut from it.
    encoded = tokenizer(text, return_attention_mask=False, verbose=False)
    return torch.tensor(encoded["input_ids"], dtype=torch.int64)


def check_token_ids(tokens: Tensor, vocab_size: int, origin: str) -> None:
    """Raise CalibrationError if the model has no embedding for a token of a text."""
    outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if outside.numel():
        raise CalibrationError(
            f"{origin} gives token id {int(outside[0])}, and the model has {vocab_size} tokens, 0 "
            f"to {vocab_size - 1}: the tokenizer is another model's, or a token was added without "
            "its embedding; remove it from the text or the tokenizer"
        )


def check_tokens(tokens: Tensor) -> None:
    """Raise CalibrationError if a tensor cannot hold calibration sequences."""
    if tokens.dim() != 2 or not tokens.numel() or not _holds_integers(tokens):
        raise CalibrationError(
            "calibration tokens must be (samples, length) integers, at least one, got "
            f"{_shape_of(tokens)}"
        )


def check_text(tokens: Tensor) -> None:
    """Raise CalibrationError if a tensor cannot hold the tokens of one text."""
    if tokens.dim() != 1 or not _holds_integers(tokens):
        raise CalibrationError(f"tokens must be (tokens,) integers, got {_shape_of(tokens)}")


def _holds_integers(tokens: Tensor) -> bool:
    numbers = tokens.is_floating_point() or tokens.is_complex()
    return not numbers and tokens.dtype != torch.bool


def _shape_of(tokens: Tensor) -> str:
    return f"{tuple(tokens.shape)} {str(tokens.dtype).removeprefix('torch.')}"


def documentation_text() -> str:
    """English that every Python brings: the topics of its own documentation, 0.46 MB."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def calibration_tokens(
    origin: str | Path,
    tokenizer: "PreTrainedTokenizerBase",
    spec: CalibrationSpec,
    vocab_size: int,
) -> Tensor:
    """Random windows of a file or data set, (num_samples, sequence_length) int64.

    Args:
        origin: name of a plain-text file; of a .jsonl file, each line with a `text`, with chat
            `messages`, or with `input_ids` and their `attention_mask`; or of a data set of the hub,
            ORGANIZATION/NAME[:CONFIGURATION[:SPLIT]], of such rows (split: train).
        tokenizer: of the model.
        spec: how many windows, how long, and the seed that chooses them.
        vocab_size: tokens that the model knows.

    Raises:
        CalibrationError: there is no such text, it is of another kind, has too few tokens or
            tokens that the model does not know, or the chat template fails on messages.
    """
    if not isinstance(origin, str | Path):
        raise CalibrationError(
            f"calibration must be the name of a file or data set, got {type(origin).__name__}"
        )
    path, name = Path(origin), str(origin)
    if re.fullmatch(r"[\w-]{1,60}", name) and not exists(path):
        raise CalibrationError(
            f"{name}: no such text file; a data set of the hub is named ORGANIZATION/NAME"
        )
    if not exists(path) and (match := _DATASET.fullmatch(name)) and not path.suffix:
        wanted = _SURPLUS * spec.num_samples * spec.sequence_length
        tokens = _row_tokens(_dataset_rows(match), tokenizer, name, wanted)
    elif is_rows(path):
        tokens = _row_tokens(read_rows(path), tokenizer, name)
    else:
        tokens = tokenize(read_text(path), tokenizer)
    check_token_ids(tokens, vocab_size, name)
    return sample_windows(tokens, spec, name)


def sample_sequences(
    text: str,
    tokenizer: "PreTrainedTokenizerBase",
    spec: CalibrationSpec,
    origin: str = "the text",
) -> Tensor:
    """`sample_windows` of a text, `origin` in errors."""
    return sample_windows(tokenize(text, tokenizer), spec, origin)


def sample_windows(
    tokens: Tensor,  # (tokens,) int64
    spec: CalibrationSpec,
    origin: str = "the text",
) -> Tensor:
    """Random windows, all different, (num_samples, sequence_length) int64.

    A text that is read more than eight times over is a warning of the log.

    Raises:
        CalibrationError: there are too few tokens for that.
    """
    length, count = spec.sequence_length, spec.num_samples
    places = tokens.numel() - length + 1
    if places < 1:
        raise CalibrationError(
            f"{origin} has {tokens.numel()} tokens, fewer than one calibration sequence of "
            f"{length}: give a longer text or a smaller --sequence-length"
        )
    if places < count:
        raise CalibrationError(
            f"{origin} has {tokens.numel()} tokens: only {places} of {count} calibration sequences "
            f"of {length} would differ; give a longer text, or a smaller --num-samples or "
            "--sequence-length"
        )
    if (readings := count * length / tokens.numel()) > _MANY_READINGS:
        _log.warning(
            "%s has %d tokens for %d calibration sequences of %d: each token is read %.1f times on "
            "average; a longer text gives better statistics",
            *(origin, tokens.numel(), count, length, readings),
        )
    generator = torch.Generator().manual_seed(spec.seed)
    starts: dict[int, None] = {}  # in the order they were drawn
    while len(starts) < count:
        draw = torch.randint(0, places, (count,), generator=generator)
        starts |= dict.fromkeys(draw.tolist())
    return torch.stack([tokens[start : start + length] for start in list(starts)[:count]])


def _row_tokens(
    rows: Iterable[dict[str, Any]],
    tokenizer: "PreTrainedTokenizerBase",
    origin: str,
    wanted: int | None = None,
) -> Tensor:
    """Tokens of rows one after another, each begun as the model begins a text."""
    parts: list[Tensor] = []
    count = 0
    for row in rows:
        parts.append(_one_row(row, tokenizer, origin))
        count += parts[-1].numel()
        if wanted is not None and count >= wanted:
            break
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


def _one_row(row: dict[str, Any], tokenizer: "PreTrainedTokenizerBase", origin: str) -> Tensor:
    # Data sets give null for columns that only other rows have.
    if row.get("input_ids") is not None:
        return _given_ids(row["input_ids"], row.get("attention_mask"), origin)
    if row.get("messages") is not None:
        try:
            text = render_chat(tokenizer, row["messages"], add_generation_prompt=False)
        except ModelError as error:
            raise CalibrationError(f"{origin}: {error}") from error
        check_characters(text, origin)
        encoded = tokenizer(
            text, add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        return torch.tensor(encoded["input_ids"], dtype=torch.int64)
    text = text_of(row, origin, "a 'text', 'messages' or 'input_ids'")
    return tokenize(text, tokenizer) if text.strip() else torch.zeros(0, dtype=torch.int64)


def _given_ids(ids: Any, mask: Any, origin: str) -> Tensor:  # (tokens,) int64
    """Tokens of a row that is tokenized already, without its padding."""
    mask = [1] * len(ids) if mask is None and isinstance(ids, list) else mask
    lists = isinstance(ids, list) and isinstance(mask, list) and len(ids) == len(mask)
    # true is an integer for Python; 1.5 would be cut to 1.
    if not lists or not all(type(i) is int and abs(i) < 2**63 for i in ids):
        raise CalibrationError(
            f"{origin}: input_ids and attention_mask must be lists of integers of one length"
        )
    return torch.tensor([i for i, kept in zip(ids, mask, strict=True) if kept], dtype=torch.int64)


@contextmanager
def _without_retries_shown() -> Iterator[None]:
    """Leave out the hub client's warnings of each attempt: the error at the end says it all."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _dataset_rows(match: re.Match[str]) -> Iterator[dict[str, Any]]:
    name, config, split = match[1], match[2] or None, match[3] or "train"
    try:
        import datasets
    except ImportError:
        raise CalibrationError(
            f"{name} is no file, and data sets of the hub are read through `datasets`, which is "
            "not installed: pip install 'quatom[eval]', or give a .txt or .jsonl file"
        ) from None
    try:
        with _without_retries_shown():
            rows = datasets.load_dataset(name, config, split=split, streaming=True)
        yield from rows
    # Offline, gated, misspelt or script-only data sets raise anything from OSError to RuntimeError.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise CalibrationError(
            f"{name} is no file and cannot be had from the hub (configuration {config or 'default'}"
            f", split {split}): {type(error).__name__}: {reason}; give a .txt or .jsonl file"
        ) from error
