"""Adam on the parameters of one block, so that its output comes near that of the float network.

Half of the loss is the squared error by the squared length of all tokens together, half the mean of
that of each token: a few tokens of huge activations would decide the first alone, and be given up
for the second alone. Some sequences are kept out: parameters are judged on those,
and the best ones that were seen stay, the first ones among them. What leaves here is never worse on
the sequences kept out than what came.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from quatom.modeling.context import full_sequences_context
from quatom.modeling.rotary import RotaryTables
from quatom.quantize.statistics import KV_BLOCK_SIZE
from quatom.quantize.tuning.block import TunedBlock

ELEMENTS_AT_ONCE = 2**24
"""Hidden values that run through the block at once; a step adds up the gradients of several runs.
Forward and backward keep some 60 times as many values: 4 GB in float32."""
JUDGEMENTS = 8
"""How often the parameters are judged, at the start besides."""
KEPT_OUT = 8
"""One of so many sequences is kept out, but at most 16."""
_MOST_KEPT_OUT = 16
_BETAS = (0.9, 0.95)
"""The gradients of rounding are noisy and the steps few: a short memory of their squares."""


class Learned(Protocol):
    """Parameters, and the weights of a block that they make."""

    def groups(self) -> Sequence[tuple[Sequence[nn.Parameter], float]]:
        """Parameters, and how far Adam moves each of them in a step at first."""

    def tensors(self) -> dict[str, Tensor]:
        """Weights by name, as `quatom.quantize.tuning.block.build_tuned_block` lists them."""

    def project(self) -> None:
        """Move parameters back to values that can be stored; after every step."""


@dataclass(frozen=True, slots=True)
class Text:
    """What enters a block, and what should leave it."""

    entering: Tensor  # (sequences, length, hidden), of the quantized network
    wanted: Tensor  # (sequences, length, hidden), of the floating-point network
    rotary: RotaryTables
    weights: Tensor = field(default_factory=lambda: torch.empty(0))  # (sequences, length)


@dataclass(frozen=True, slots=True)
class Learning:
    """How parameters are learned."""

    steps: int
    sequences: int
    """Sequences of a step."""
    seed: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """Loss on the sequences kept out."""

    before: float
    after: float


def learn(block: TunedBlock, learned: Learned, text: Text, options: Learning) -> Outcome:
    """Move the parameters of `learned` in place, and leave the best."""
    with torch.enable_grad(), _same_bytes():
        return _learn(block, learned, text, options)


def _learn(block: TunedBlock, learned: Learned, text: Text, options: Learning) -> Outcome:
    text = replace(text, weights=_weights(text.wanted))
    count = len(text.entering)
    kept = min(count // KEPT_OUT, _MOST_KEPT_OUT) or 1
    known = torch.arange(max(count - kept, 1))
    judged = torch.arange(count - kept, count)
    batches = _batches(known, min(options.sequences, len(known)), options.seed)
    moved = [(list(parameters), rate) for parameters, rate in learned.groups() if rate > 0]
    optimizer = torch.optim.Adam(
        [{"params": parameters, "lr": rate} for parameters, rate in moved],
        betas=_BETAS,
        fused=True,
    )
    every = [parameter for parameters, _ in moved for parameter in parameters]
    before = least = _judge(block, learned, text, judged)
    best = [parameter.detach().clone() for parameter in every]
    for step in range(1, options.steps + 1):
        for group, (_, rate) in zip(optimizer.param_groups, moved, strict=True):
            group["lr"] = rate * (1 - (step - 1) / options.steps)
        optimizer.zero_grad()
        _add_gradients(block, learned, text, next(batches))
        optimizer.step()
        learned.project()
        if step * JUDGEMENTS // options.steps == (step - 1) * JUDGEMENTS // options.steps:
            continue
        if (loss := _judge(block, learned, text, judged)) < least:
            least = loss
            best = [parameter.detach().clone() for parameter in every]
    with torch.no_grad():
        for parameter, value in zip(every, best, strict=True):
            parameter.copy_(value)
    return Outcome(before, least)


def _batches(known: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    """Sequences of step after step: all of them in random order, again and again."""
    generator, left = torch.Generator().manual_seed(seed), known[:0]
    while True:
        if len(left) < size:
            left = torch.cat((left, known[torch.randperm(len(known), generator=generator)]))
        yield left[:size]
        left = left[size:]


def _add_gradients(block: TunedBlock, learned: Learned, text: Text, batch: Tensor) -> None:
    tensors = learned.tensors()
    # Some follow from no parameter, as the weights of norms after a linear.
    leaves = {n: t.detach().requires_grad_(t.requires_grad) for n, t in tensors.items()}
    for rows in _parts(batch, text):
        loss = _losses(block, leaves, text, rows).sum() / (len(batch) * text.entering.shape[1])
        loss.backward()
    made = [name for name, leaf in leaves.items() if leaf.grad is not None]
    torch.autograd.backward([tensors[n] for n in made], [leaves[n].grad for n in made])


@torch.no_grad()
def _judge(block: TunedBlock, learned: Learned, text: Text, judged: Tensor) -> float:
    tensors = learned.tensors()
    losses = [_losses(block, tensors, text, rows).double().sum() for rows in _parts(judged, text)]
    loss = float(torch.stack(losses).sum() / (len(judged) * text.entering.shape[1]))
    return loss if loss == loss else float("inf")


def _parts(batch: Tensor, text: Text) -> Sequence[Tensor]:
    size = text.entering[0].numel()
    return batch.split(max(1, ELEMENTS_AT_ONCE // size))


def _losses(
    block: TunedBlock, tensors: Mapping[str, Tensor], text: Text, rows: Tensor
) -> Tensor:  # (sequences, length) float32
    rows = rows.to(text.entering.device)
    entering, wanted = text.entering[rows], text.wanted[rows].float()
    count, length, _ = entering.shape
    context = full_sequences_context(count, length, KV_BLOCK_SIZE, entering.device)
    arguments = (entering.flatten(0, 1), None, context, None, text.rotary)
    output, residual = functional_call(block, dict(tensors), arguments)
    made = (output.float() + residual.float()).view_as(entering)
    return (made - wanted).square().sum(dim=-1) * text.weights[rows]


def _weights(wanted: Tensor) -> Tensor:
    """What the squared error of each token counts, (sequences, length) float32."""
    # In float32 a sequence at a time: the whole text would need another copy.
    sizes = torch.stack([sequence.float().square().sum(dim=-1) for sequence in wanted])
    sizes = sizes.clamp(min=torch.finfo(torch.float32).tiny)
    return 0.5 / sizes + 0.5 / sizes.mean()


@contextmanager
def _same_bytes() -> Iterator[None]:
    """Kernels whose sums do not depend on timing, where torch has a choice: on a GPU."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        # cuBLAS asks for a variable of the environment, which one stream of work does not need.
        warnings.filterwarnings("ignore", message=".*[dD]eterministic.*")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warn_only)
