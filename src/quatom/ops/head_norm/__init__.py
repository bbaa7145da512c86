"""Norm of q and k before rotary embedding, both in one launch."""

from dataclasses import dataclass

from torch import Tensor

from quatom.errors import ShapeError
from quatom.families.spec import HeadNormAxis, Norm
from quatom.ops.backend import Backend, choose_backend

BACKENDS = (Backend.REFERENCE, Backend.TRITON)


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """How q and k are normalized."""

    q_weight: Tensor  # (D,); (H, D) for the axis "each", (H * D,) for "all"; contiguous
    k_weight: Tensor  # (D,); (KV, D); (KV * D,)
    norm: Norm
    axis: HeadNormAxis


def head_norm(
    q: Tensor,  # (T, H, D) last axis contiguous; usually a view of the fused qkv output
    k: Tensor,  # (T, KV, D) same dtype as q, last axis contiguous
    norms: HeadNorms,
    *,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalize q and k, over the channels of each head or over those of all heads of a token.

    The arithmetic and its rounding are those of `quatom.ops.norm`, without a bias.

    Args:
        norms: weights, kind, eps and offset.
        backend: implementation to run; None picks the fastest one for q's device.

    Returns:
        q (T, H, D) and k (T, KV, D) in their own dtype: views of one new tensor (T, H + KV, D).

    Raises:
        ShapeError: shapes or dtypes disagree, or the norm has a bias.

    Source: Dehghani et al., ICML 2023, for norms of queries and keys.
    """
    check_head_norm(q, k, norms)
    if choose_backend("head_norm", BACKENDS, q.device, backend) is Backend.TRITON:
        from quatom.ops.head_norm.triton import head_norm_triton as run
    else:
        from quatom.ops.head_norm.reference import head_norm_reference as run
    return run(q, k, norms.q_weight, norms.k_weight, norms.norm, norms.axis)


def check_head_norm(q: Tensor, k: Tensor, norms: HeadNorms) -> None:
    """What `head_norm` asks of its arguments.

    Raises:
        ShapeError: shapes or dtypes disagree, or the norm has a bias.
    """
    if q.ndim != 3 or k.ndim != 3 or k.shape[::2] != q.shape[::2] or k.dtype != q.dtype:
        raise ShapeError(
            f"expected q (T, H, D) and k (T, KV, D) of one dtype, got {tuple(q.shape)} {q.dtype} "
            f"and {tuple(k.shape)} {k.dtype}"
        )
    if norms.norm.bias:
        raise ShapeError("the norm of q and k has a bias, which head_norm does not add")
    for name, x, weight in (("q", q, norms.q_weight), ("k", k, norms.k_weight)):
        _, heads, channels = x.shape
        shapes = {"head": (channels,), "each": (heads, channels), "all": (heads * channels,)}
        expected = shapes[norms.axis]
        if weight.shape != expected or not weight.is_contiguous():
            raise ShapeError(
                f"axis {norms.axis!r} needs a contiguous weight {expected} for {name} "
                f"{tuple(x.shape)}, got {tuple(weight.shape)} with strides {weight.stride()}"
            )
