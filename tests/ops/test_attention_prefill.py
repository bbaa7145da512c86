"""The Triton kernel over the packed workspace of prefills, against float64."""

import pytest
import torch
from tests.covering import covering

from quatom.ops.attention import AttentionOptions
from quatom.ops.attention.triton_prefill import prefill_triton

LENGTHS = ((5, 0), (33, 40), (70, 3))
"""(new tokens, cached ones before them) of the sequences of a batch."""


def truth(q, k, v, options):
    """One head: rows of q are the last tokens of k and v."""
    scores = q.double() @ k.double().t() * options.softmax_scale
    if options.logit_softcap is not None:
        scores = (scores / options.logit_softcap).tanh() * options.logit_softcap
    position = torch.arange(len(q))[:, None] + len(k) - len(q)
    token = torch.arange(len(k))
    seen = token <= position
    if options.sliding_window is not None:
        seen &= token > position - options.sliding_window
    scores = scores.masked_fill(~seen, float("-inf"))
    if options.sinks is None:
        return scores.softmax(-1) @ v.double()
    joined = torch.cat((scores, options.sinks.double().expand(len(q), 1)), 1)
    return joined.softmax(-1)[:, :-1] @ v.double()


# The head size is a width of tiles; windows, soft-caps and sinks change scores one after another.
@pytest.mark.parametrize(
    ("head_dim", "sinks", "window", "softcap"),
    covering((64, 128, 80), (False, True), (None, 9), (None, 3.0)),
)
def test_packed_sequences(head_dim, sinks, window, softcap, device):
    rng = torch.Generator().manual_seed(head_dim)
    heads, kv_heads = 4, 2
    new = sum(n for n, _ in LENGTHS)
    total = sum(n + before for n, before in LENGTHS)
    strided = torch.randn(new, heads + 1, head_dim, generator=rng).half()  # rows of q, k and v
    q = strided[:, :heads]
    k, v = (torch.randn(total, kv_heads, head_dim, generator=rng).half() for _ in range(2))
    logits = torch.randn(heads, generator=rng) if sinks else None
    options = AttentionOptions(
        0.7 * head_dim**-0.5, window, softcap, sinks=None if logits is None else logits.to(device)
    )
    starts = [
        torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
        for counts in ([n for n, _ in LENGTHS], [n + before for n, before in LENGTHS])
    ]
    out = torch.full((new, heads, head_dim), float("nan"), dtype=torch.half, device=device)
    q_device = strided.to(device)[:, :heads]
    most = max(n for n, _ in LENGTHS)
    prefill_triton(q_device, k.to(device), v.to(device), out, *starts, most, options)
    for index in range(len(LENGTHS)):
        q_rows, k_rows = (slice(*bounds[index : index + 2].tolist()) for bounds in starts)
        for head in range(heads):
            own = AttentionOptions(
                options.softmax_scale,
                window,
                softcap,
                sinks=None if logits is None else logits[head : head + 1],
            )
            kv = k[k_rows, head // 2], v[k_rows, head // 2]
            want = truth(q[q_rows, head], *kv, own)
            # Weights are rounded to float16, and results once more: 2**-11 of values up to 4 each.
            torch.testing.assert_close(out[q_rows, head].double().cpu(), want, rtol=0, atol=5e-3)
