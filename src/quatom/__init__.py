"""Quatom: low-bit quantization and serving of language models, an implementation of Atom.

Public names are imported when first used, so that `import quatom` and `quatom --help` stay fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quatom.engine.llm import LLM as LLM
    from quatom.engine.sampling import SamplingParams as SamplingParams
    from quatom.loading import load as load
    from quatom.quantize.pipeline import quantize_checkpoint as quantize_checkpoint
    from quatom.recipe import PRESETS as PRESETS
    from quatom.recipe import Recipe as Recipe

__version__ = "0.1.0"

_PUBLIC = {
    "LLM": "quatom.engine.llm",
    "SamplingParams": "quatom.engine.sampling",
    "Recipe": "quatom.recipe",
    "PRESETS": "quatom.recipe",
    "load": "quatom.loading",
    "quantize_checkpoint": "quatom.quantize.pipeline",
}

__all__ = [
    "LLM",
    "PRESETS",
    "Recipe",
    "SamplingParams",
    "__version__",
    "load",
    "quantize_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'quatom' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
