"""Budgets of one constraint: what compiling it and computing one of its masks may cost.

Counts bound the work of a mask, since a library call cannot be interrupted; a trial in a process of
its own (`trial`) bounds the time to compile, and measures masks before a request is admitted.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLParserLimits

COMPILE_SECONDS = 2
"""CPU time to check, translate and compile a constraint and to compute a few masks."""
WAIT_SECONDS = 60
"""Time on the clock that this may take: a busy machine may give a trial little of its CPU time."""
COMPILE_BYTES = 2**30
"""Memory that this may take."""
MASK_SECONDS = 0.1
"""CPU time of one mask at most, measured on the first TRIAL_STEPS tokens of two texts."""
SLOW_MASK_SECONDS = 0.003
"""A constraint whose typical mask takes longer does not hold up others: see `masks`."""
TRIAL_STEPS = 24


def parser_limits() -> "LLParserLimits":
    """The counters of llguidance, chosen by measuring: a mask stays below 50 ms.

    Measured on one core of a virtual machine at a vocabulary of 54,616: ambiguous grammars, which
    the default limits let take 990 ms for a mask, take 4 to 13 ms; the masks of a schema with 400
    optional properties or an enum of 1,000 objects, which these limits let pass, take 3 to 6 ms.
    """
    from llguidance import LLParserLimits

    return LLParserLimits(
        step_max_items=5_000,
        step_lexer_fuel=50_000,
        max_lexer_states=25_000,  # 1 to 2 KB each
        verbose_errors=False,
    )
