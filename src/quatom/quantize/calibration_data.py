"""Token sequences to measure statistics on, sampled from a plain-text file."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quatom.errors import CalibrationError
from quatom.recipe import CalibrationSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_text(path: str | Path) -> str:
    """The text of a file.

    Raises:
        CalibrationError: it does not exist, or is not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CalibrationError(f"{path}: no such text file") from None
    except IsADirectoryError:
        raise CalibrationError(f"{path} is a folder; give a plain-text file") from None
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path} is not UTF-8 text (byte {error.start}): convert it, or give another file"
        ) from None


def text_fingerprint(path: str | Path) -> str:
    """SHA-256 of the text, by which a resumed run knows that it calibrates on the same one."""
    return hashlib.sha256(read_text(path).encode()).hexdigest()


def tokenize(text: str, tokenizer: "PreTrainedTokenizerBase") -> Tensor:
    """All tokens of a text, (tokens,) int64, with the tokenizer's own beginning-of-text token."""
    # Longer than the model's context on purpose: windows are cut from it.
    encoded = tokenizer(text, return_attention_mask=False, verbose=False)
    return torch.tensor(encoded["input_ids"], dtype=torch.int64)


def sample_sequences(
    path: str | Path, tokenizer: "PreTrainedTokenizerBase", spec: CalibrationSpec
) -> Tensor:
    """Random windows of the tokenized text, (num_samples, sequence_length) int64.

    Raises:
        CalibrationError: the text has fewer tokens than one sequence.
    """
    tokens = tokenize(read_text(path), tokenizer)
    last_start = tokens.numel() - spec.sequence_length
    if last_start < 0:
        raise CalibrationError(
            f"{path} has {tokens.numel()} tokens, fewer than one calibration sequence of "
            f"{spec.sequence_length}: give a longer text or a smaller --sequence-length"
        )
    generator = torch.Generator().manual_seed(spec.seed)
    starts = torch.randint(0, last_start + 1, (spec.num_samples,), generator=generator)
    return torch.stack([tokens[s : s + spec.sequence_length] for s in starts.tolist()])
