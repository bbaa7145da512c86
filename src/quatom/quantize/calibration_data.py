"""Token sequences to measure statistics on, sampled from a plain-text file."""

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
        CalibrationError: it does not exist, cannot be read, or is not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CalibrationError(f"{path}: no such text file") from None
    except IsADirectoryError:
        raise CalibrationError(f"{path} is a folder; give a plain-text file") from None
    except OSError as error:
        raise CalibrationError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path} is not UTF-8 text (byte {error.start}): convert it, or give another file"
        ) from None


def tokenize(text: str, tokenizer: "PreTrainedTokenizerBase") -> Tensor:
    """All tokens of a text, (tokens,) int64, with the tokenizer's own beginning-of-text token."""
    # Longer than the model's context on purpose: windows are cut from it.
    encoded = tokenizer(text, return_attention_mask=False, verbose=False)
    return torch.tensor(encoded["input_ids"], dtype=torch.int64)


def documentation_text() -> str:
    """English that every Python brings: the topics of its own documentation, 0.46 MB."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def sample_sequences(
    text: str,
    tokenizer: "PreTrainedTokenizerBase",
    spec: CalibrationSpec,
    origin: str = "the text",
) -> Tensor:
    """Random windows of the tokenized text, (num_samples, sequence_length) int64.

    Args:
        text: what to sample from.
        tokenizer: of the model.
        spec: how many windows, how long, and the seed that chooses them.
        origin: what an error calls the text.

    Raises:
        CalibrationError: the text has fewer tokens than one sequence.
    """
    tokens = tokenize(text, tokenizer)
    last_start = tokens.numel() - spec.sequence_length
    if last_start < 0:
        raise CalibrationError(
            f"{origin} has {tokens.numel()} tokens, fewer than one calibration sequence of "
            f"{spec.sequence_length}: give a longer text or a smaller --sequence-length"
        )
    generator = torch.Generator().manual_seed(spec.seed)
    starts = torch.randint(0, last_start + 1, (spec.num_samples,), generator=generator)
    return torch.stack([tokens[s : s + spec.sequence_length] for s in starts.tolist()])
