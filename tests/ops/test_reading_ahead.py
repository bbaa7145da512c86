"""Kernels that read what is there before the kernel before them ends: the same numbers."""

import pytest
import torch

from quatom.numerics.kv_pages import KVPages
from quatom.ops.attention import attention
from quatom.ops.backend import Backend
from quatom.ops.rope_append_kv import rope_append_kv

HEADS, KV_HEADS, DIM, BLOCK = 8, 2, 128, 16


def _inputs(lengths: list[int], new: int, device: torch.device) -> dict:
    rng = torch.Generator().manual_seed(3)
    blocks = [-(-length // BLOCK) for length in lengths]
    order = torch.randperm(sum(blocks), generator=rng).int()
    tables = torch.zeros(len(lengths), max(blocks), dtype=torch.int32)
    for row, ids in zip(tables, order.split(blocks), strict=True):
        row[: len(ids)] = ids
    positions = torch.cat([torch.arange(length - new, length) for length in lengths])
    rows = torch.arange(len(lengths)).repeat_interleave(new)
    slots = tables[rows, positions // BLOCK].long() * BLOCK + positions % BLOCK
    angles = torch.rand(max(lengths), DIM // 2, generator=rng)
    on_device = {
        "tables": tables,
        "positions": positions,
        "slots": slots,
        "cos": angles.cos(),
        "sin": angles.sin(),
        "starts": torch.arange(len(lengths) + 1).int() * new,
        "lengths": torch.tensor(lengths).int(),
    }
    return {name: tensor.to(device) for name, tensor in on_device.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("new", [1, 4])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("window", [None, 100])
def test_append_and_decode_read_ahead_and_give_the_same_bits(new, splits, window, device):
    """Lengths around the edges of tiles, where old and new tokens meet in one."""
    lengths = [4, 31, 32, 33, 64, 65, 130, 255, 257, 400, 1024, 1025]
    given = _inputs(lengths, new, device)
    width = (HEADS + 2 * KV_HEADS) * DIM
    weight = torch.randn(width, 512, device=device).half() / 22
    storage = KVPages.allocate(given["tables"].max() + 1, BLOCK, KV_HEADS, DIM, "int4", device)
    storage.storage.random_(0, 60)  # pairs of float16 below 1.4

    def layers(settled: bool) -> list[torch.Tensor]:
        pages = KVPages(storage.storage.clone(), BLOCK, DIM, "int4")
        rng = torch.Generator().manual_seed(1)
        first = torch.randn(len(lengths) * new, 512, generator=rng).to(device, torch.float16)

        def run() -> list[torch.Tensor]:
            hidden, results = first, []
            for _ in range(6):  # the same slots again: a tile that is read too early is an old one
                heads = (hidden @ weight.t()).unflatten(1, (-1, DIM))
                q, k, v = heads.split((HEADS, KV_HEADS, KV_HEADS), dim=1)
                q = rope_append_kv(
                    *(q, k, v, given["cos"], given["sin"], given["positions"], given["slots"]),
                    pages,
                    settled=settled,
                    backend=Backend.CUDA,
                )
                attended = attention(
                    q,
                    pages,
                    block_tables=given["tables"],
                    cu_seqlens_q=given["starts"],
                    seq_lens=given["lengths"],
                    max_seqlen_q=new,
                    max_seq_len=max(lengths),
                    sliding_window=window,
                    num_splits=splits,
                    settled=settled,
                    backend=Backend.CUDA,
                )
                hidden = attended.flatten(1)[:, :512].roll(1, dims=0).contiguous()
                results.append(attended)
            return results

        run()  # loads modules
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = run()
        graph.replay()
        torch.cuda.synchronize()
        return [*(result.clone() for result in results), pages.storage]

    for one, other in zip(layers(False), layers(True), strict=True):
        assert torch.equal(one, other)
    assert not any(result.isnan().any() for result in layers(True)[:-1])
