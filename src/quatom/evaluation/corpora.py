"""WikiText-2, Penn Treebank and C4 as the papers evaluate on them, from files or from the hub.

Tables of different papers agree only if the text does, byte for byte:

- wikitext2: the raw *test* split; rows are joined with two newlines.
- ptb: the *validation* split of the text-only release; sentences are joined with two newlines.
- c4: 256 windows at random places of random long enough documents of the first validation shard,
  drawn by Python's `random` with seed 0. (The others are tokenized whole and cut in order.)

Source: GPTQ (Frantar et al., ICLR 2023), evaluation; used unchanged by Atom.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from quatom.errors import CalibrationError
from quatom.quantize.calibration_data import tokenize
from quatom.quantize.text_files import is_rows, read_rows, read_text, text_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CorpusName = Literal["wikitext2", "ptb", "c4"]

C4_WINDOWS = 256
C4_SEED = 0


@dataclass(frozen=True, slots=True)
class _Origin:
    files: tuple[str, ...]
    """Official file names; a file so called is read by the corpus's protocol."""
    dataset: tuple[str, str | None]
    """Hub dataset and configuration."""
    split: str
    column: str
    data_files: str | None = None
    revision: str | None = None


_ORIGINS: dict[str, _Origin] = {
    "wikitext2": _Origin(
        ("wiki.test.raw",), ("Salesforce/wikitext", "wikitext-2-raw-v1"), "test", "text"
    ),
    "ptb": _Origin(
        ("ptb.valid.txt",),
        ("ptb-text-only/ptb_text_only", None),
        "validation",
        "sentence",
        # The main branch holds a loading script, which `datasets` 4 and newer do not run.
        revision="refs/convert/parquet",
    ),
    "c4": _Origin(
        ("c4-validation.00000-of-00008.json.gz", "c4-validation.00000-of-00008.json"),
        ("allenai/c4", None),
        "train",  # the one split that a list of data files makes
        "text",
        data_files="en/c4-validation.00000-of-00008.json.gz",
    ),
}

CORPORA = tuple(_ORIGINS)
"""Names that `load_corpus` knows."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """A tokenized corpus, ready to be cut into windows."""

    name: str
    """One of `CORPORA`, or the name of a text file."""
    tokens: Tensor  # (tokens,) int64
    """The whole text, or the windows of c4 one after another: either way it is cut in order."""


def wikitext_rows(text: str) -> str:
    r"""The text of a raw WikiText file as evaluated: its hub rows joined with two newlines.

    A row is a line with its newline; a blank line is an empty row.
    """
    # Not splitlines(): the text holds other characters which that takes for line ends.
    lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    return "\n\n".join(f"{line}\n" if line.strip() else "" for line in lines)


def ptb_sentences(text: str) -> str:
    """The text of a Penn Treebank file as evaluated: stripped lines joined with two newlines."""
    lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    return "\n\n".join(line.strip() for line in lines)


def c4_windows(
    documents: list[str],
    tokenizer: "PreTrainedTokenizerBase",
    sequence_length: int = 2048,
    count: int = C4_WINDOWS,
    seed: int = C4_SEED,
) -> Tensor:
    """Random windows of random documents, (count, sequence_length) int64.

    Documents are drawn until one has `sequence_length` tokens, then a start in it; a document may
    be drawn again.

    Raises:
        CalibrationError: no document is long enough.
    """
    draw = random.Random(seed)
    tokenized: dict[int, Tensor] = {}
    windows: list[Tensor] = []
    while len(windows) < count:
        index = draw.randint(0, len(documents) - 1) if documents else 0
        if documents and index not in tokenized:
            tokenized[index] = tokenize(documents[index], tokenizer)
        if len(tokenized) >= len(documents) and all(
            tokens.numel() < sequence_length for tokens in tokenized.values()
        ):
            raise CalibrationError(
                f"none of {len(documents)} documents has {sequence_length} tokens: give the whole "
                f"C4 shard {_ORIGINS['c4'].files[0]}, or a smaller --sequence-length"
            )
        spare = tokenized[index].numel() - sequence_length
        if spare >= 0:
            # The protocol never draws the last possible start.
            start = draw.randint(0, max(spare - 1, 0))
            windows.append(tokenized[index][start : start + sequence_length])
    return torch.stack(windows)


@dataclass(frozen=True, slots=True)
class CorpusText:
    """A corpus before a tokenizer is known."""

    name: str
    documents: list[str]
    """Of c4; one text otherwise."""

    def tokenized(
        self, tokenizer: "PreTrainedTokenizerBase", sequence_length: int = 2048
    ) -> Corpus:
        """The tokens; windows of c4 have `sequence_length` each.

        Raises:
            CalibrationError: no document of c4 is long enough.
        """
        if self.name == "c4":
            windows = c4_windows(self.documents, tokenizer, sequence_length)
            return Corpus(self.name, windows.flatten())
        return Corpus(self.name, tokenize(self.documents[0], tokenizer))


def load_corpus(
    name_or_path: str | Path,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    sequence_length: int = 2048,
    data_dir: Path | None = None,
) -> Corpus:
    """Tokens to measure perplexity on: `read_corpus`, tokenized.

    Args:
        name_or_path: as in `read_corpus`.
        tokenizer: of the model.
        sequence_length: tokens per window; only c4 is drawn by it.
        data_dir: as in `read_corpus`.

    Raises:
        CalibrationError: the text cannot be found, read or downloaded, or is too short.
    """
    return read_corpus(name_or_path, data_dir=data_dir).tokenized(tokenizer, sequence_length)


def read_corpus(name_or_path: str | Path, *, data_dir: Path | None = None) -> CorpusText:
    """The text to measure perplexity on.

    Args:
        name_or_path: one of `CORPORA`, or a file. A file with the official name of a corpus
            (wiki.test.raw, ptb.valid.txt, c4-validation.00000-of-00008.json.gz) is read by its
            protocol; of any other .jsonl file the `text` fields are joined with two newlines; any
            other text is used as it is.
        data_dir: folder in which a named corpus lies, itself or in a folder called like the
            corpus; without it the corpus comes from the hub through `datasets`.

    Raises:
        CalibrationError: the text cannot be found, read or downloaded.
    """
    name = str(name_or_path)
    if name in _ORIGINS:
        path = None if data_dir is None else _find(name, Path(data_dir))
    else:
        path = Path(name_or_path)
        name = next((n for n, o in _ORIGINS.items() if path.name in o.files), path.name)

    if name == "c4":
        return CorpusText(name, _hub_rows(name) if path is None else _read_documents(path))
    if path is None:
        text = "\n\n".join(_hub_rows(name))
    elif name == "wikitext2":
        text = wikitext_rows(read_text(path))
    elif name == "ptb":
        text = ptb_sentences(read_text(path))
    elif is_rows(path):
        text = "\n\n".join(_read_documents(path))
    else:
        text = read_text(path)
    return CorpusText(name, [text])


def _find(name: str, data_dir: Path) -> Path:
    files = _ORIGINS[name].files
    for folder in (data_dir / name, data_dir):
        for file in files:
            if (folder / file).is_file():
                return folder / file
    raise CalibrationError(
        f"{data_dir} holds no {name}: put {files[0]} into {data_dir / name}, or leave --data-dir "
        "out to download it"
    )


def _read_documents(path: Path) -> list[str]:
    return [text_of(row, str(path)) for row in read_rows(path)]


def _hub_rows(name: str) -> list[str]:
    origin = _ORIGINS[name]
    where = f"put {origin.files[0]} into a folder and give it with --data-dir"
    try:
        import datasets
    except ImportError:
        raise CalibrationError(
            f"{name} is downloaded through `datasets`, which is not installed: "
            f"pip install 'quatom[eval]', or {where}"
        ) from None
    dataset, config = origin.dataset
    options: dict[str, Any] = {
        "split": origin.split,
        "data_files": origin.data_files,
        "revision": origin.revision,
    }
    try:
        rows: Iterable[dict[str, str]] = datasets.load_dataset(dataset, config, **options)
    # Offline, gated, moved or script-only datasets raise anything from OSError to RuntimeError.
    except Exception as error:
        raise CalibrationError(
            f"{name} cannot be had from the hub ({dataset}): {type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''}; {where}"
        ) from error
    return [row[origin.column] for row in rows]
