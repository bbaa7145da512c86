"""The interface of transformers around a tokenizer of the tokenizers library."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
"""Roles of tokens that Quatom asks for."""


def wrap_core(
    core: "Tokenizer",
    special: Mapping[str, str],
    chat_template: str | dict[str, str] | None,
    *,
    clean_up: bool = False,
) -> "PreTrainedTokenizerBase":
    """A tokenizer of transformers whose tokens are those of `core`.

    Args:
        special: tokens by their names in `SPECIAL_NAMES`.
        chat_template: one template, or several by name.
        clean_up: remove spaces before punctuation when decoding, where transformers does.
    """
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    # Saved with some tokenizers; text is cut into windows here, never truncated or filled.
    core.no_truncation()
    core.no_padding()
    if core.post_processor is None:  # or transformers would choose one
        core.post_processor = processors.TemplateProcessing(
            single="$A", pair="$A $B", special_tokens=[]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        clean_up_tokenization_spaces=clean_up,
        chat_template=chat_template,
        **special,
    )


def add_template(core: "Tokenizer", bos: str | None, eos: str | None) -> None:
    """Begin every text with `bos` and end it with `eos`, after what the tokenizer does already."""
    from tokenizers import processors

    ids = {t: i for t in (bos, eos) if t is not None and (i := core.token_to_id(t)) is not None}
    if not ids:
        return
    single, pair = ["$A:0"], ["$A:0", "$B:1"]
    if bos in ids:
        single, pair = [f"{bos}:0", "$A:0"], [f"{bos}:0", "$A:0", f"{bos}:1", "$B:1"]
    if eos in ids:
        single.append(f"{eos}:0")
        pair.insert(pair.index("$A:0") + 1, f"{eos}:0")
        pair.append(f"{eos}:1")
    template = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=list(ids.items())
    )
    before = core.post_processor
    core.post_processor = template if before is None else processors.Sequence([before, template])
