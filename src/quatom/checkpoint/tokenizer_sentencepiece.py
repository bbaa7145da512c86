"""SentencePiece's BPE, built of the tokenizers library: from its own file, or from pieces.

transformers builds a tokenizer of `tokenizer.model` too, but not the same one in every release.

Source: Kudo and Richardson, SentencePiece (EMNLP 2018); sentencepiece_model.proto for the fields.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quatom.errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPACE = "\u2581"
"""What stands for a space in pieces."""

_REMEDY = "put the model's tokenizer.json beside it"
# ModelProto.SentencePiece.Type and TrainerSpec.ModelType
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5
_KINDS = {1: "unigram", 2: "BPE", 3: "word", 4: "character"}
_BPE = 2


def build_bpe(
    tokens: Sequence[str],
    scores: Mapping[int, float],
    *,
    unknown: str | None,
    before: Sequence[Any] = (),
    prefix: bool = True,
    byte_fallback: bool = True,
) -> "Tokenizer":
    """A tokenizer that merges the pair whose piece scores most first.

    Args:
        tokens: all pieces, by id.
        scores: of the pieces that text is made of, by id.
        unknown: the piece of what is no other one.
        before: normalizers of the text, before its spaces are replaced.
        prefix: begin every text with a space.
        byte_fallback: characters that are no piece become those of their bytes.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    pieces = {tokens[index]: index for index in scores}
    merges = [
        (-scores[index], index, token[:cut], token[cut:])
        for token, index in pieces.items()
        for cut in range(1, len(token))
        if token[:cut] in pieces and token[cut:] in pieces
    ]
    core = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=[(left, right) for *_, left, right in sorted(merges)],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=byte_fallback,
        )
    )
    spaces: list[Any] = [normalizers.Replace(" ", SPACE)]
    decoding: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        spaces.insert(0, normalizers.Prepend(SPACE))
        decoding.append(decoders.Strip(content=" ", left=1))
    core.normalizer = normalizers.Sequence([*before, *spaces])
    core.decoder = decoders.Sequence(decoding)
    return core


def read_model(file: Path) -> "Tokenizer":
    """The tokenizer of a `tokenizer.model`, without what begins and ends texts.

    Raises:
        CheckpointError: the file is damaged or not of BPE, or a package is missing.
    """
    model = _parse(file)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if trainer.model_type != _BPE:
        kind = _KINDS.get(trainer.model_type, f"number {trainer.model_type}")
        raise CheckpointError(
            f"{file} is a SentencePiece model of kind {kind}, and BPE is what is read; {_REMEDY}"
        )
    if not normalizer.escape_whitespaces or trainer.treat_whitespace_as_suffix:
        raise CheckpointError(
            f"{file} puts spaces elsewhere than before words (escape_whitespaces "
            f"{normalizer.escape_whitespaces}, treat_whitespace_as_suffix "
            f"{trainer.treat_whitespace_as_suffix}), which is not supported; {_REMEDY}"
        )
    kinds = [piece.type for piece in model.pieces]
    if normalizer.add_dummy_prefix and _USER_DEFINED in kinds:
        raise CheckpointError(
            f"{file} has user-defined symbols and begins texts with a space, which is not "
            f"supported together; {_REMEDY}"
        )
    core = build_bpe(
        [piece.piece for piece in model.pieces],
        {i: p.score for i, p in enumerate(model.pieces) if p.type in (_NORMAL, _UNUSED)},
        unknown=next((p.piece for p in model.pieces if p.type == _UNKNOWN), None),
        before=_normalizers(normalizer),
        prefix=normalizer.add_dummy_prefix,
        byte_fallback=trainer.byte_fallback,
    )
    _add_whole(core, model.pieces)
    return core


def _parse(file: Path) -> Any:
    try:
        from google.protobuf.message import DecodeError
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise CheckpointError(
            f"{file} is read through the packages sentencepiece and protobuf, which are not "
            f"installed: pip install 'quatom[sentencepiece]', or {_REMEDY}"
        ) from error
    # Made at import of the descriptor: no checker of types sees it.
    model = vars(sentencepiece_model_pb2)["ModelProto"]()
    try:
        model.ParseFromString(file.read_bytes())
    except DecodeError as error:
        raise CheckpointError(
            f"{file} cannot be read as a SentencePiece model ({error}); {_REMEDY}"
        ) from error
    if not model.pieces:
        raise CheckpointError(
            f"{file} cannot be read as a SentencePiece model (it has no pieces); {_REMEDY}"
        )
    return model


def _normalizers(spec: Any) -> list[Any]:
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    return steps


def _add_whole(core: "Tokenizer", pieces: Sequence[Any]) -> None:
    """Control symbols, and user-defined ones, which are taken out of the text before all else."""
    from tokenizers import AddedToken

    core.add_tokens(
        [
            AddedToken(
                p.piece if p.type == _CONTROL else p.piece.replace(SPACE, " "),
                normalized=False,
                special=p.type == _CONTROL,
            )
            for p in pieces
            if p.type in (_CONTROL, _USER_DEFINED) and p.piece
        ]
    )
