"""Quatom: low-bit quantization and serving of language models, an implementation of Atom.

Public names are imported when first used, so that `import quatom` and `quatom --help` stay fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from quatom.version import __version__ as __version__

if TYPE_CHECKING:
    from quatom.engine.config import EngineConfig as EngineConfig
    from quatom.engine.llm import LLM as LLM
    from quatom.engine.outputs import CompletionOutput as CompletionOutput
    from quatom.engine.outputs import RequestOutput as RequestOutput
    from quatom.engine.sampling import SamplingParams as SamplingParams
    from quatom.errors import QuatomError as QuatomError
    from quatom.evaluation.perplexity import Perplexity as Perplexity
    from quatom.evaluation.perplexity import measure_perplexity as measure_perplexity
    from quatom.evaluation.zero_shot import evaluate_tasks as evaluate_tasks
    from quatom.loading import LoadedModel as LoadedModel
    from quatom.loading import load as load
    from quatom.presets import PRESETS as PRESETS
    from quatom.quantize.pipeline import QuantizeReport as QuantizeReport
    from quatom.quantize.pipeline import quantize_checkpoint as quantize_checkpoint
    from quatom.recipe import Recipe as Recipe

_PUBLIC = {
    "LLM": "quatom.engine.llm",
    "EngineConfig": "quatom.engine.config",
    "RequestOutput": "quatom.engine.outputs",
    "CompletionOutput": "quatom.engine.outputs",
    "LoadedModel": "quatom.loading",
    "QuantizeReport": "quatom.quantize.pipeline",
    "QuatomError": "quatom.errors",
    "Perplexity": "quatom.evaluation.perplexity",
    "measure_perplexity": "quatom.evaluation.perplexity",
    "evaluate_tasks": "quatom.evaluation.zero_shot",
    "SamplingParams": "quatom.engine.sampling",
    "Recipe": "quatom.recipe",
    "PRESETS": "quatom.presets",
    "load": "quatom.loading",
    "quantize_checkpoint": "quatom.quantize.pipeline",
}

__all__ = [
    "LLM",
    "PRESETS",
    "CompletionOutput",
    "EngineConfig",
    "LoadedModel",
    "Perplexity",
    "QuantizeReport",
    "QuatomError",
    "Recipe",
    "RequestOutput",
    "SamplingParams",
    "__version__",
    "evaluate_tasks",
    "load",
    "measure_perplexity",
    "quantize_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'quatom' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
