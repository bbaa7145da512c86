"""Linear layers of a mixture of experts: each row is multiplied by the experts of its token.

A token t is routed to k experts: *slot* t * k + j is its j-th. `group_tokens` sorts slots by
expert, so that each expert has a run of *positions*; `expert_linear` multiplies each run by the
weights of its expert, and `combine` adds up the k results of a token:

    groups = group_tokens(routing.expert_ids, num_experts)
    hidden = expert_linear(x, gate_up, groups, top_k=k)       # (T, K) -> (T k, N), grouped
    y = expert_linear(hidden, down, groups, top_k=None)       # (T k, I) -> (T k, hidden), grouped
    out = combine(y, groups, routing.weights)                 # (T, hidden)

An expert's product is that of `quatom.ops.linear`: the same formats, layouts and exactness.

Limits of the backends:

reference  every format, any device; reads the routing on the host, one expert after another
cpu        as that of `linear`, one expert after another
triton     as that of `linear`
cuda       as that of `linear`, Hopper

The launches of triton and cuda depend on T, k and E alone, never on how tokens are routed: both
can be captured in CUDA graphs.
"""

import torch
from torch import Tensor

from quatom.errors import ShapeError
from quatom.numerics.groups import GroupLayout, ScaleMode
from quatom.ops.activations import MixedTensor
from quatom.ops.backend import Backend
from quatom.ops.experts.groups import ExpertSum, combine, group_tokens, summed
from quatom.ops.experts.prepared import PreparedExperts
from quatom.ops.experts.routing import Routing, TokenGroups
from quatom.ops.linear import prepare_weights
from quatom.ops.linear.choice import choose_linear_backend

__all__ = [
    "BACKENDS",
    "ExpertSum",
    "PreparedExperts",
    "Routing",
    "TokenGroups",
    "combine",
    "expert_linear",
    "group_tokens",
    "prepare_experts",
    "summed",
]

BACKENDS = (Backend.REFERENCE, Backend.CPU, Backend.TRITON, Backend.CUDA)
_ONE_BY_ONE = (Backend.REFERENCE, Backend.CPU)


def prepare_experts(
    values: Tensor,  # (E, N, K) weight codes in reordered channel order
    scales: Tensor,  # (E, N, S) float16
    layout: GroupLayout,
    *,
    bias: Tensor | None = None,  # (E, N)
    weight_format: str = "int4",
    activation_format: str = "int4",
    outlier_format: str = "int8",
    scale_mode: ScaleMode = "group",
    backend: Backend | None = None,
) -> PreparedExperts:
    """Repack the weights of all experts once, at load; see `linear.prepare_weights`.

    Experts share the layout and the formats, each has its own codes, scales and bias. One expert is
    repacked at a time.

    Raises:
        ShapeError: values, scales, bias and layout do not fit each other.
        BackendError: the backend asked for cannot run these formats on this device.
    """
    if values.ndim != 3 or values.shape[2] != layout.channels or not values.shape[0]:
        raise ShapeError(
            f"expected values (E, N, {layout.channels}) of at least one expert as the layout says; "
            f"got {tuple(values.shape)}"
        )
    experts, rows = values.shape[:2]
    if scales.shape != (experts, rows, layout.num_scales):
        raise ShapeError(
            f"expected scales ({experts}, {rows}, {layout.num_scales}): one per expert, row and "
            f"group; got {tuple(scales.shape)}"
        )
    if bias is not None and bias.shape != (experts, rows):
        raise ShapeError(f"expected bias ({experts}, {rows}); got {tuple(bias.shape)}")

    formats = (weight_format, activation_format, outlier_format)
    all_scales = scales.flatten(0, 1)
    chosen = choose_linear_backend(
        "experts", BACKENDS, values[0], all_scales, layout, formats, scale_mode, backend
    )

    def prepare(index: int) -> tuple[Tensor, ...]:
        return prepare_weights(
            values[index],
            scales[index],
            layout,
            weight_format=weight_format,
            activation_format=activation_format,
            outlier_format=outlier_format,
            scale_mode=scale_mode,
            backend=chosen,
        ).tensors

    tensors: tuple[Tensor, ...]
    if chosen in _ONE_BY_ONE:
        tensors = tuple(tensor for index in range(experts) for tensor in prepare(index))
    else:
        own = prepare(0)
        tensors = tuple(tensor.new_empty((experts, *tensor.shape)) for tensor in own)
        for index in range(experts):
            own = prepare(index) if index else own
            for all_experts, tensor in zip(tensors, own, strict=True):
                all_experts[index] = tensor
        if values.is_cuda:  # as `prepare_weights` does: no kernel may fetch what is being packed
            torch.cuda.synchronize(values.device)
    return PreparedExperts(
        backend=chosen,
        layout=layout,
        out_channels=rows,
        weight_format=weight_format,
        activation_format=activation_format,
        tensors=tensors,
        bias=None if bias is None else bias.float(),
        num_experts=experts,
    )


def expert_linear(
    x: MixedTensor | Tensor,  # (T, K), or (T k, K) where `top_k` is None
    experts: PreparedExperts | Tensor,  # (E, N, K) in floating point
    groups: TokenGroups,
    *,
    top_k: int | None,
    bias: Tensor | None = None,  # (E, N), of floating-point experts
    following: PreparedExperts | None = None,
) -> Tensor:
    """Multiply each grouped position's row by the weights of its expert: (T k, N) in x's dtype.

    Results do not depend on how other tokens are routed, up to float32 rounding for e4m3 and
    floating-point operands; on integer codes not at all.

    Args:
        x: activations as `linear` takes them. Under floating-point experts codes are dequantized.
        experts: prepared weights, or floating-point ones.
        groups: of `group_tokens`.
        top_k: position p multiplies row slots[p] // top_k of x; None: rows of x are in grouped
            order already, as a result of this function is.
        bias: added to floating-point experts; prepared ones carry theirs.
        following: what multiplies rows in the order of the result next, by the same groups; cuda
            prepares that in the same launch.

    Raises:
        ShapeError: x, experts, groups and top_k do not fit each other.
    """
    positions = groups.slots.numel()
    slots_per_row = 1 if top_k is None else top_k
    if len(x.shape) != 2 or slots_per_row < 1 or x.shape[0] * slots_per_row != positions:
        raise ShapeError(
            f"{tuple(x.shape)} rows of x with top_k {top_k} do not make the {positions} positions "
            "of the groups"
        )
    if isinstance(experts, Tensor):
        return _multiply_floats(x, experts, groups, top_k, bias)
    experts.check_input(x)
    if experts.num_experts != groups.num_experts:
        raise ShapeError(
            f"tokens are grouped for {groups.num_experts} experts, the weights are those of "
            f"{experts.num_experts}"
        )
    if bias is not None:
        raise ShapeError("prepared experts carry their bias: give it to prepare_experts")
    match experts.backend:
        case Backend.CUDA:
            from quatom.ops.experts.cuda import experts_cuda

            return experts_cuda(x, experts, groups, top_k, following=following)
        case Backend.TRITON:
            from quatom.ops.experts.triton import experts_triton

            return experts_triton(
                x,
                experts.tensors,
                experts.layout,
                experts.out_channels,
                experts.bias,
                groups,
                top_k,
            )
        case _:
            from quatom.ops.experts.reference import experts_reference

            return experts_reference(x, experts, groups, top_k)


def _multiply_floats(
    x: MixedTensor | Tensor,
    weights: Tensor,
    groups: TokenGroups,
    top_k: int | None,
    bias: Tensor | None,
) -> Tensor:
    if weights.ndim != 3 or weights.shape[0] != groups.num_experts:
        raise ShapeError(
            f"expected weights ({groups.num_experts}, N, K) of the experts that tokens are grouped "
            f"for; got {tuple(weights.shape)}"
        )
    if x.shape[1] != weights.shape[2]:
        raise ShapeError(f"expected x (T, {weights.shape[2]}) as the weights; got {tuple(x.shape)}")
    if bias is not None and bias.shape != weights.shape[:2]:
        raise ShapeError(f"expected bias {tuple(weights.shape[:2])}; got {tuple(bias.shape)}")
    if isinstance(x, MixedTensor):
        x = x.dequantize().to(weights.dtype)
    if x.is_cuda and x.dtype is not torch.float32:
        from quatom.ops.experts.triton import float_experts_triton as run
    else:
        from quatom.ops.experts.reference import float_reference as run
    return run(x, weights, groups, top_k, bias)
