"""Weights where vLLM was asked for dummies: what `vllm bench` measures."""

from collections.abc import Mapping

import torch
from torch import nn

_SCALES = {"weight_scale": 2.0**-8, "row_scale": 2.0**-11, "outlier_scale": 2.0**-12}
"""With these a weight's standard deviation is about 0.02, whatever stores it."""


def fill_dummies(parameters: Mapping[str, nn.Parameter]) -> None:
    """Valid weights in place of dummies: any codes, equal scales, any order of the channels.

    Args:
        parameters: by the last part of a stored tensor's name; others stay as they are.
    """
    for name, parameter in parameters.items():
        if parameter.dtype is torch.uint8:  # packed codes and multiples
            parameter.data.random_(0, 256)
        elif parameter.dtype is torch.int8:
            parameter.data.random_(-127, 128)
        elif name in _SCALES:
            parameter.data.fill_(_SCALES[name])
        elif name == "order":
            order = torch.randperm(parameter.shape[-1], device=parameter.device)
            parameter.data.copy_(order.expand_as(parameter))
