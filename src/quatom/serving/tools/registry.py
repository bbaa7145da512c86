"""All formats, and which of them a chat template has."""

from quatom.errors import RequestError
from quatom.serving.tools.format import ToolFormat
from quatom.serving.tools.granite import GRANITE
from quatom.serving.tools.harmony import HARMONY
from quatom.serving.tools.hermes import HERMES
from quatom.serving.tools.llama import LLAMA
from quatom.serving.tools.mistral import MISTRAL, MISTRAL_ARGS
from quatom.serving.tools.phi import FUNCTOOLS, PHI
from quatom.serving.tools.pythonic import PYTHONIC
from quatom.serving.tools.qwen_coder import QWEN_CODER

FORMATS: tuple[ToolFormat, ...] = (
    HARMONY,
    QWEN_CODER,
    FUNCTOOLS,
    PHI,
    GRANITE,
    HERMES,
    MISTRAL_ARGS,
    MISTRAL,
    PYTHONIC,
    LLAMA,
)
"""The first one that a template has a sign of is its format."""


def detect(template: str) -> ToolFormat | None:
    """The format of a chat template."""
    return next((f for f in FORMATS if f.is_in(template)), None)


def format_named(name: str) -> ToolFormat:
    """The format of that name.

    Raises:
        RequestError: there is none.
    """
    found = next((f for f in FORMATS if f.name == name), None)
    if found is None:
        raise RequestError(f"no tool format is named {name!r}; there are {', '.join(names())}")
    return found


def names() -> list[str]:
    """Names of all formats."""
    return [f.name for f in FORMATS]
