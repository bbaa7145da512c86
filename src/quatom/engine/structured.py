"""Structured output through xgrammar: which tokens keep the text within its grammar.

A grammar is compiled once for a request, in the caller's thread; its matcher then fills one row of
bits before each sampling and is told the token that was chosen.
"""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quatom.engine.sampling import StructuredOutput
from quatom.errors import RequestError

if TYPE_CHECKING:
    import xgrammar

MAX_GRAMMAR_CHARS = 100_000
"""Length of a schema, expression or grammar; compilation time grows with it."""


class Matcher:
    """The state of one sequence's grammar."""

    def __init__(self, compiled: "xgrammar.CompiledGrammar", stop_token_ids: list[int]) -> None:
        import xgrammar

        self._matcher = xgrammar.GrammarMatcher(compiled, override_stop_tokens=stop_token_ids)

    @property
    def terminated(self) -> bool:
        """Whether the text is complete and its end token was accepted."""
        return self._matcher.is_terminated()

    def fill(self, mask: Tensor, row: int) -> None:
        """Set row `row` of an int32 CPU bit mask to the tokens allowed next."""
        self._matcher.fill_next_token_bitmask(mask, row)

    def accept(self, token_id: int) -> bool:
        """Advance by a token; False if the grammar does not allow it."""
        return self._matcher.accept_token(token_id)


class GrammarCompiler:
    """Compiles grammars for one tokenizer; results are cached by xgrammar."""

    def __init__(self, tokenizer: Any, vocab_size: int, stop_token_ids: tuple[int, ...]) -> None:
        if tokenizer is None:
            raise RequestError("structured output needs a tokenizer, and this model has none")
        if not stop_token_ids:
            raise RequestError("structured output needs an end-of-sequence token; there is none")
        import xgrammar

        self._vocab_size = vocab_size
        self._stop_token_ids = list(stop_token_ids)
        info = xgrammar.TokenizerInfo.from_huggingface(
            tokenizer, vocab_size=vocab_size, stop_token_ids=self._stop_token_ids
        )
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1)

    def matcher(self, wanted: StructuredOutput) -> Matcher:
        """A fresh matcher.

        Raises:
            RequestError: the schema, expression or grammar is not valid.
        """
        if len(wanted.value) > MAX_GRAMMAR_CHARS:
            raise RequestError(
                f"the {wanted.kind} has {len(wanted.value)} characters; at most "
                f"{MAX_GRAMMAR_CHARS} are accepted"
            )
        try:
            compiled = self._compile(wanted)
        except (RuntimeError, ValueError, TypeError, RecursionError) as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise RequestError(f"invalid {wanted.kind}: {reason[-1]}") from error
        matcher = Matcher(compiled, self._stop_token_ids)
        mask = build_mask([matcher], self._vocab_size)
        if mask is not None and not mask.any():
            raise RequestError(f"invalid {wanted.kind}: it allows no text at all")
        return matcher

    def _compile(self, wanted: StructuredOutput) -> "xgrammar.CompiledGrammar":
        match wanted.kind:
            # Free whitespace would let a model fill its whole length with it.
            case "json_schema":
                if not isinstance(json.loads(wanted.value), dict | bool):
                    raise ValueError("a JSON schema is an object")
                return self._compiler.compile_json_schema(wanted.value, any_whitespace=False)
            case "json_object":
                return self._compiler.compile_json_schema(
                    '{"type": "object"}', any_whitespace=False
                )
            case "regex":
                return self._compiler.compile_regex(wanted.value)
            case "grammar":
                return self._compiler.compile_grammar(wanted.value)


def build_mask(matchers: Sequence[Matcher | None], vocab_size: int) -> Tensor | None:
    """(M, ceil(vocab / 32)) int32 bits of allowed tokens, on the CPU; None: all are allowed."""
    if not any(matchers):
        return None
    mask = torch.full((len(matchers), -(-vocab_size // 32)), -1, dtype=torch.int32)
    for row, matcher in enumerate(matchers):
        if matcher is not None:
            matcher.fill(mask, row)
    return mask
