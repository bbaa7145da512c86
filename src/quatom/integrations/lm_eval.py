"""Quatom models in lm-evaluation-harness, by the name "quatom". Needs the extra `eval`.

The harness looks for models in its own package alone, so its command is run from here:

    python -m quatom.integrations.lm_eval run --model quatom --model_args pretrained=CHECKPOINT ...

Every other option is the harness's. In Python importing this module is enough.
"""

from typing import Any

import lm_eval.models  # noqa: F401  fills the registry: an entry of ours alone would hide the others
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import MODEL_REGISTRY, register_model

from quatom.errors import RequestError
from quatom.evaluation.harness_model import QuatomLM
from quatom.loading import load

NAME = "quatom"
"""What `--model` takes."""


class QuatomHarnessModel(QuatomLM):
    """The model of `quatom eval --tasks`, made from the harness's own arguments."""

    def __init__(
        self,
        pretrained: str,
        *,
        device: str | None = None,
        dtype: str | None = None,
        batch_tokens: int = 4096,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **unknown: Any,
    ) -> None:
        """Load a model.

        Args:
            pretrained: Folder, hub id, GGUF or Quatom checkpoint.
            device: Where it runs; None: the GPU if there is one.
            dtype: Of activations: float32, bfloat16 or float16; None: as `quatom.load`.
            batch_tokens: Tokens of a forward pass.
            batch_size: The harness always gives one. Sequences are packed, so it says nothing.
            max_batch_size: As above.
            unknown: Refused.

        Raises:
            RequestError: an argument is unknown.
            QuatomError: the model cannot be loaded.
        """
        if unknown:
            raise RequestError(
                f"model_args has {', '.join(sorted(unknown))}; known are pretrained, device, dtype "
                "and batch_tokens"
            )
        loaded = load(pretrained, device=device, dtype=dtype)
        super().__init__(loaded, batch_tokens=batch_tokens)


if NAME not in MODEL_REGISTRY:
    register_model(NAME)(QuatomHarnessModel)

if __name__ == "__main__":
    cli_evaluate()
