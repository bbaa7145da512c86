"""Final norm and output head of a model, without its blocks."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from quatom.checkpoint.reader import TensorSource
from quatom.loading import read_norm
from quatom.modeling.decoder import scale_logits
from quatom.modeling.inputs import NormLayer
from quatom.ops.backend import Backend


class OutputHead:
    """What makes logits of the hidden states that leave the last block."""

    def __init__(
        self,
        source: TensorSource,
        device: torch.device,
        dtype: torch.dtype,
        backend: Backend | None = None,
    ) -> None:
        """Read the tensors of a floating-point model."""

        def read(name: str, shape: tuple[int, ...] | None = None) -> Tensor:
            return source.load(name).to(device=device, dtype=dtype)

        self.config = config = source.model_config
        norm, name = config.final_norm, config.final_norm_name
        self._norm = NormLayer(norm, read_norm(read, norm, name, config.hidden_size), backend)
        self._head = read(config.embedding_name if config.tie_word_embeddings else config.head_name)
        self._bias = read(config.head_bias_name) if config.head_bias else None

    def norm(self, hidden: Tensor) -> Tensor:  # (T, hidden)
        """Hidden states after the final norm."""
        return self._norm(hidden)[0]

    def logits(self, normed: Tensor) -> Tensor:  # (T, hidden) -> (T, vocab) float32
        """Scores of the next token."""
        return scale_logits(self.config, linear(normed, self._head, self._bias).float())
