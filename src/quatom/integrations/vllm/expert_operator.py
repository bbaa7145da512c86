"""The torch operator of a layer's routed experts: choose, quantize, multiply, add up.

As in `operator`, what does not change from call to call is named by a text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256

import torch
from torch import Tensor

from quatom.families.spec import Experts
from quatom.integrations.vllm.opaque import from_arguments, is_opaque
from quatom.integrations.vllm.operator import read_input
from quatom.modeling.router import route
from quatom.ops.activations import MixedTensor, QuantizeSpec
from quatom.ops.experts import PreparedExperts, combine, expert_linear, group_tokens
from quatom.ops.gated import gated
from quatom.ops.gated_quantize import gated_quantize

Part = tuple[QuantizeSpec | None, PreparedExperts]
"""How an input is quantized, None where it stays in floating point, and what multiplies it."""


@dataclass(frozen=True, slots=True)
class ExpertScheme:
    """Experts of a layer without their tensors."""

    experts: Experts
    gate_up: Part
    down: Part
    opaque: tuple[tuple[bool, ...], ...]
    """Of each weight tensor of both: the operator gets its number, see `as_argument`."""


_schemes: dict[str, ExpertScheme] = {}


def name_expert_scheme(experts: Experts, gate_up: Part, down: Part) -> str:
    """The name under which `quatom::routed_experts` finds this scheme in this process."""
    # Biases are few and no family that runs here has any: `CheckpointState.resolve`.
    opaque = tuple(tuple(map(is_opaque, part.tensors)) for _, part in (gate_up, down))
    scheme = ExpertScheme(experts, _bare(gate_up), _bare(down), opaque)
    name = sha256(repr(scheme).encode()).hexdigest()[:16]
    _schemes[name] = scheme
    return name


def _bare(part: Part) -> Part:
    spec, prepared = part
    return spec, replace(prepared, tensors=())


def routed_experts(
    x: Tensor,  # (T, hidden)
    logits: Tensor,  # (T, E)
    correction: Tensor | None,  # (E,) float32, of the choice by sigmoid scores
    order: Tensor | None,  # (hidden,) int32
    gate_up: Sequence[Tensor],  # as `as_argument` makes them
    down: Sequence[Tensor],
    scheme: str,
) -> Tensor:  # (T, hidden)
    """What the chosen experts of each token make of it, as `DecoderBlock` computes it."""
    known = _schemes[scheme]
    experts, feed = known.experts, known.experts.feed_forward
    (spec, first), (made_spec, second) = known.gate_up, known.down
    first = replace(first, tensors=from_arguments(gate_up, known.opaque[0]))
    second = replace(second, tensors=from_arguments(down, known.opaque[1]))
    routing = route(logits.float(), experts, correction)
    groups = group_tokens(routing.expert_ids, experts.count)
    y = expert_linear(read_input(x, order, spec), first, groups, top_k=experts.top_k)
    made: Tensor | MixedTensor
    if made_spec is None:
        made = gated(y, feed.activation, feed.gated)
    else:
        made = gated_quantize(y, made_spec, feed.activation, feed.gated)
    y = expert_linear(made, second, groups, top_k=None)
    return combine(y, groups, routing.weights)


def _fake(
    x: Tensor,
    logits: Tensor,
    correction: Tensor | None,
    order: Tensor | None,
    gate_up: Sequence[Tensor],
    down: Sequence[Tensor],
    scheme: str,
) -> Tensor:
    return torch.empty_like(x)


_library = torch.library.Library("quatom", "FRAGMENT")
_library.define(
    "routed_experts(Tensor x, Tensor logits, Tensor? correction, Tensor? order, "
    "Tensor[] gate_up, Tensor[] down, str scheme) -> Tensor"
)
_library.impl("routed_experts", routed_experts, "CPU")
_library.impl("routed_experts", routed_experts, "CUDA")
torch.library.register_fake("quatom::routed_experts", _fake, lib=_library)
