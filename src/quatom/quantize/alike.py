"""Processes transform the same weights by the same statistics: they must come to the same."""

import hashlib

import torch

from quatom.errors import QuantizationError
from quatom.modeling.weights import LayerWeights
from quatom.plan import LayerPlan
from quatom.quantize.ranks import Ranks


def check_alike(ranks: Ranks, layer: LayerPlan, weights: LayerWeights) -> None:
    """Raise QuantizationError if processes made different norms, orders or biases of a layer."""
    if ranks.count == 1:
        return
    digests = ranks.tell(digest_of(weights))
    others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise QuantizationError(
            f"{layer.prefix[:-1]}: process {others[0]} of {ranks.count} made other norms or orders "
            "of the same statistics than process 0; use the same kind of device, the same "
            "libraries and the same number of threads for all"
        )


def digest_of(weights: LayerWeights) -> str:
    """A hash of everything that a layer holds beside its matrices and its router."""
    held = [held for norm in weights.norms.values() for held in (norm.weight, norm.bias)]
    held += [weights.key_offset, *(weights.qk_norm or ())]
    held += [tensor for site in weights.sites.values() for tensor in (site.bias, site.order)]
    digest = hashlib.sha256()
    for tensor in held:
        if tensor is not None:
            plain = tensor.detach().cpu().contiguous().flatten()
            digest.update(plain.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
