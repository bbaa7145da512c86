"""Which functions an answer may call, whether it must, and the grammar of that."""

from dataclasses import dataclass, replace
from typing import Any

from quatom.serving.tools.format import Grammar, ToolFormat
from quatom.serving.tools.function import Function


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What a request allows to be called."""

    format: ToolFormat
    functions: dict[str, Function]
    """Those that may be called, by name."""
    required: bool = False
    """Answer with calls alone."""
    parallel: bool = True
    """More than one call may be made at once."""

    def grammar(self, content: Grammar | None, *, not_first: str = "") -> Grammar | None:
        """The grammar of an answer; None: it is free.

        Args:
            content: the grammar of an answer without calls, if it has one.
            not_first: a character that free text does not begin with.
        """
        functions = list(self.functions.values())
        if self.required:
            return self.format.led(self.format.required(functions, self.parallel))
        if content is not None:
            calls = self.format.required(functions, self.parallel)
            either = {"type": "or", "elements": [calls, self.format.content(content)]}
            return self.format.led(either)
        if not any(function.strict for function in functions):
            return None
        anything: dict[str, Any] = {"type": "object"}
        enforced = [f if f.strict else replace(f, parameters=anything) for f in functions]
        return self.format.allowed(enforced, self.parallel, not_first=not_first)
