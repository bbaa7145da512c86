"""Checks a constraint, and measures what its masks cost on the first tokens of two texts."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from quatom.engine.sampling import StructuredOutput
from quatom.engine.structured import limits
from quatom.engine.structured.blame import explain
from quatom.engine.structured.grammar import compile_constraint
from quatom.errors import RequestError

NO_TEXT = "NoExtension"
"""In llguidance's error where nothing can follow."""


@dataclass(frozen=True, slots=True)
class Workbench:
    """What trials need: a tokenizer of llguidance, special tokens by name, and those that end."""

    tokenizer: Any
    special_tokens: dict[str, int]
    stop_token_ids: frozenset[int]


def attempt(bench: Workbench, wanted: StructuredOutput) -> dict[str, Any]:
    """Check, translate and compile a constraint, and measure some masks.

    Returns:
        {"grammar": text for llguidance, "slow": whether its masks are}, or {"refused": reason}.
    """
    from llguidance import LLMatcher

    parser_limits = limits.parser_limits()

    def complaint(grammar: str) -> str:
        return LLMatcher.validate_grammar(grammar, None, limits=parser_limits)

    def refuse(reason: str = "") -> dict[str, Any]:
        text = explain(constraint, reason, complaint) or "it allows no text at all"
        return {"refused": f"invalid {wanted.kind}: {text}"}

    try:
        constraint = compile_constraint(wanted, bench.special_tokens)
    except RequestError as refusal:
        return {"refused": str(refusal)}
    grammar = constraint.text()
    matcher = LLMatcher(bench.tokenizer, grammar, log_level=0, limits=parser_limits)
    if matcher.is_error():
        return refuse(matcher.get_error())
    first = _token_ids(matcher.compute_bitmask())
    error = _first_line(matcher.get_error())
    if error and NO_TEXT not in error:
        return {"refused": _too_costly(wanted, error, 0)}
    if error or not first.size:
        return refuse()
    if bench.stop_token_ids.issuperset(first.tolist()):
        return {"refused": f"invalid {wanted.kind}: it allows the empty text alone"}
    seconds = []
    for choose in (_any_token, _short_token):
        walked, error = _walk(bench, matcher.deep_copy(), choose)
        seconds += walked
        if not error and max(walked) > limits.MASK_SECONDS:
            error = f"a mask took {max(walked) * 1e3:.0f} ms"
        if error:
            return {"refused": _too_costly(wanted, error, len(walked))}
    slow = max(median(seconds), max(seconds) / 10) > limits.SLOW_MASK_SECONDS
    return {"grammar": grammar, "slow": slow}


def _too_costly(wanted: StructuredOutput, error: str, steps: int) -> str:
    return (
        f"the {wanted.kind} is too costly to enforce: {error} after {steps} tokens; the budget is "
        f"{limits.MASK_SECONDS * 1e3:.0f} ms of CPU time for each token: use fewer alternatives, "
        "shorter literals and smaller repetitions"
    )


Choose = Callable[[Workbench, np.ndarray, int], int]


def _walk(bench: Workbench, matcher: Any, choose: Choose) -> tuple[list[float], str]:
    """CPU time of each mask of a text of up to TRIAL_STEPS tokens, and what went wrong."""
    seconds = []
    for step in range(limits.TRIAL_STEPS):
        started = time.thread_time()
        bits = matcher.compute_bitmask()
        seconds.append(time.thread_time() - started)
        if matcher.is_error():
            return seconds, _first_line(matcher.get_error())
        allowed = _token_ids(bits)
        if not allowed.size:
            return seconds, "this model has no token with which the text can go on"
        matcher.consume_token(choose(bench, allowed, step))
        if matcher.is_error():
            return seconds, _first_line(matcher.get_error())
        if matcher.is_stopped():
            break
    return seconds, ""


def _first_line(error: str) -> str:
    """The first line of an error of llguidance, which may go on with its whole state."""
    return error.strip().partition("\n")[0][:300]


def _token_ids(bits: bytes) -> np.ndarray:
    return np.flatnonzero(np.unpackbits(np.frombuffer(bits, dtype=np.uint8), bitorder="little"))


def _any_token(bench: Workbench, allowed: np.ndarray, step: int) -> int:
    return int(allowed[step * 7919 % len(allowed)])


def _short_token(bench: Workbench, allowed: np.ndarray, step: int) -> int:
    some = allowed[:: max(1, len(allowed) // 16)].tolist()
    return min(some, key=lambda token: len(bench.tokenizer.decode_bytes([token])))
