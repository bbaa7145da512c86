"""What is kept of a run block by block: tensors, errors and, to go on from, hidden states.

The leading process has the writer. Hidden states are saved whole, in the order of the sequences, so
that a run may go on with another number of processes.
"""

import time
from collections.abc import Mapping
from math import isnan
from typing import Any

import torch
from torch import Tensor

from quatom.checkpoint.writer import CheckpointWriter
from quatom.families.spec import SITES
from quatom.quantize.expert_report import ExpertReport
from quatom.quantize.lanes import Share
from quatom.quantize.ranks import Ranks
from quatom.quantize.walk import QuantizedBlock, Streams

LARGE_STATE = 2**28
"""Bytes of hidden states; larger ones are not saved after every block."""
STATE_SECONDS = 60.0
"""Time between two saves of large hidden states: what an interruption can cost. A 7B model's, 4.3
GB, would otherwise take longer to write than its blocks to quantize."""
_NONE = float("nan")
_EXPERTS = "experts-"


class BlockLog:
    """Writes blocks and what they cost, and reads what an interrupted run left."""

    def __init__(self, ranks: Ranks, writer: CheckpointWriter | None) -> None:
        """Look at what is there; `writer` is None in all processes but the leading one."""
        self.ranks, self.writer = ranks, writer
        with ranks.together():
            mine = (False, 0, 0) if writer is None else _progress(writer)
        self.finished, self.completed_blocks, self.first = ranks.tell(mine)[0]
        self.streams: Streams | None = None
        self._saved, self._saved_at = self.first - 1, time.monotonic()
        # Row i: relative error of the hidden states after block i, then of each site, if it has it.
        self._errors = torch.zeros(0, 1 + len(SITES), dtype=torch.float64)
        self._experts: dict[str, Tensor] = {}

    def resume(self, share: Share | None, device: torch.device) -> None:
        """Read the state in front of block `first`; of hidden states the own sequences."""
        if not self.first:
            return
        state: dict[str, Tensor] = {}
        with self.ranks.together():
            if self.writer is not None:
                state = self.writer.load_state(_state_name(self.first - 1))
                self._errors = state.pop("errors")
                self._experts = {n: row for n, row in state.items() if n.startswith(_EXPERTS)}
        if share is None:
            return
        streams = {}
        for name in ("float", "quantized"):
            held = {name: state.pop(name)} if self.ranks.leads else {}
            whole = self.ranks.from_rank(held, 0)[name]
            streams[name] = whole[share.own].to(device)
        self.streams = Streams(streams["float"], streams["quantized"])

    def add(self, block: QuantizedBlock, streams: Streams | None, share: Share | None) -> None:
        """Write a block, and now and then the state after it."""
        relative = _NONE if block.relative_error is None else block.relative_error
        row = torch.tensor([[relative, *(block.linear_errors.get(site, _NONE) for site in SITES)]])
        self._errors = torch.cat((self._errors, row.double()))
        if block.experts is not None:
            self._experts[f"{_EXPERTS}{block.index}"] = block.experts.state()
        state: dict[str, Tensor] = {"errors": self._errors} | self._experts
        held: dict[str, Tensor] = {}
        if streams is not None:
            assert streams.float_hidden is not None
            held = {"float": streams.float_hidden, "quantized": streams.quantized_hidden}
        size = sum(tensor.nbytes for tensor in [*state.values(), *held.values()])
        due = sum(self.ranks.tell(size)) < LARGE_STATE
        due = due or self.ranks.tell(time.monotonic() - self._saved_at >= STATE_SECONDS)[0]
        if due and share is not None:
            whole = {name: share.collect(tensor) for name, tensor in held.items()}
            state |= {name: tensor for name, tensor in whole.items() if tensor is not None}
        with self.ranks.together():
            if self.writer is not None:
                # In this order there is a state at every moment, and none for a missing block.
                if due:
                    self.writer.save_state(_state_name(block.index), state)
                self.writer.write_block(block.index, block.tensors)
                if due:
                    self.writer.drop_state(_state_name(self._saved))
        if due:
            self._saved, self._saved_at = block.index, time.monotonic()

    def finish(self, documents: Mapping[str, Mapping[str, Any]]) -> None:
        """Write the rest, and rename."""
        with self.ranks.together():
            if self.writer is not None:
                self.writer.finish(documents)

    def describe(self, bound: int) -> list[dict[str, object]]:
        """Errors of all blocks as JSON; an uncalibrated block has no relative error."""
        blocks: list[dict[str, object]] = []
        for index, row in enumerate(self._errors.tolist()):
            sites = zip(SITES, row[1:], strict=True)
            block: dict[str, object] = {
                "block": index,
                "relative_error": None if isnan(row[0]) else row[0],
                "linear_errors": {site: error for site, error in sites if not isnan(error)},
            }
            if (state := self._experts.get(f"{_EXPERTS}{index}")) is not None:
                block["experts"] = ExpertReport.from_state(state).describe(bound)
            blocks.append(block)
        return blocks


def _progress(writer: CheckpointWriter) -> tuple[bool, int, int]:
    """Whether all is done, complete blocks, and the block to go on with."""
    completed = first = writer.completed_blocks()
    while first and not writer.has_state(_state_name(first - 1)):
        first -= 1  # blocks after the last saved state are made again, to the same bytes
    return writer.finished, completed, first


def _state_name(index: int) -> str:
    return f"after-{index}"
