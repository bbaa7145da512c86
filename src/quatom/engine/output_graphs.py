"""OutputGraphs: what follows the last attention as CUDA graphs, for the rows that are needed."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from quatom.engine.cuda_graphs import size_classes
from quatom.engine.graph_pool import GraphPool, record
from quatom.engine.model import Model


class OutputGraphs:
    """One graph for each class of numbers of rows. They are padded with rows of earlier steps."""

    def __init__(
        self,
        model: Model,
        pool: GraphPool,
        attended: Tensor,  # (T, H, D), whose rows will be like these
        residual: Tensor,  # (T, hidden)
        most: int,
    ) -> None:
        self._attended = attended.new_zeros((most, *attended.shape[1:]))
        self._residual = residual.new_zeros((most, *residual.shape[1:]))
        self._sizes = size_classes(most)
        self._graphs: dict[int, tuple[Any, Tensor]] = {}
        for size in reversed(self._sizes):  # the largest first: smaller ones reuse its memory
            run = partial(model.finish, self._attended[:size], self._residual[:size])
            self._graphs[size] = record(pool, run)

    def replay(
        self,
        attended: Tensor,  # (T, H, D)
        residual: Tensor,  # (T, hidden)
        rows: Tensor,  # (M,) int64
    ) -> Tensor:
        """Hidden states (M, hidden) of these rows; overwritten by the next replay."""
        used = rows.shape[0]
        if not used:
            return residual[:0]
        size = next(size for size in self._sizes if size >= used)
        torch.index_select(attended, 0, rows, out=self._attended[:used])
        torch.index_select(residual, 0, rows, out=self._residual[:used])
        graph, hidden = self._graphs[size]
        graph.replay()
        return hidden[:used]
