"""Sequences in a paged cache, and what attention over them must give."""

import torch

from quatom.numerics.kv_pages import KVPages
from quatom.ops.attention import attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Relative error in norm. Weights are rounded to the query's dtype (2**-11 or 2**-8 of each) before
# they meet one-sided codes, whose root mean square is about three times their deviation; the output
# is rounded once more.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


class Batch:
    """Sequences in randomly ordered blocks of a cache whose every other byte is poison."""

    def __init__(
        self,
        lengths,
        new_tokens=1,
        *,
        heads=2,
        kv_heads=1,
        head_dim=64,
        block_size=16,
        kv="int4",
        dtype=torch.float32,
        gain=1.0,
        shift=0.5,
        seed=0,
        device=DEVICE,
    ):
        rng = torch.Generator().manual_seed(seed)
        new = [new_tokens] * len(lengths) if isinstance(new_tokens, int) else new_tokens
        counts = [-(-length // block_size) for length in lengths]
        pages = KVPages.allocate(sum(counts) + 3, block_size, kv_heads, head_dim, kv, "cpu")
        pages.storage.fill_(0xFF)  # NaN as float16, bfloat16 and float32
        free = torch.randperm(pages.num_blocks, generator=rng).int()
        # Entries past a sequence's blocks must never be read: they point nowhere.
        tables = torch.full((len(lengths), max(counts, default=0) + 1), 2**24, dtype=torch.int32)
        self.kv = []
        for b, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            tables[b, :count], free = free[:count], free[count:]
            k, v = (torch.randn(length, kv_heads, head_dim, generator=rng) for _ in range(2))
            token = torch.arange(length)
            slots = tables[b].long()[token // block_size] * block_size + token % block_size
            pages.append(gain * k, gain * (v + shift), slots)
            self.kv.append([x.double() for x in pages.gather(tables[b], length)])
        q = torch.randn(sum(new), heads, head_dim, generator=rng)
        self.q = q.to(device, dtype)
        # Some sinks outweigh all tokens, some are nothing beside them.
        self.sinks = (4.0 * torch.randn(heads, generator=rng)).to(device)
        self.new, self.lengths = new, lengths
        self.pages = KVPages(pages.storage.to(device), block_size, head_dim, kv)
        starts = torch.tensor([0, *new]).cumsum(0).int()
        self.arguments = dict(
            block_tables=tables.to(device),
            cu_seqlens_q=starts.to(device),
            seq_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
            max_seqlen_q=max(new),
            max_seq_len=max(lengths),
        )

    def run(self, backend=None, *, sinks=False, **options):
        options |= {"sinks": self.sinks} if sinks else {}
        return attention(self.q, self.pages, **self.arguments, **options, backend=backend)

    def truth(self, *, scale=None, window=None, softcap=None, sinks=False):
        """Dense attention in float64, written without regard to any implementation."""
        rows, first = [], 0
        for (k, v), n, length in zip(self.kv, self.new, self.lengths, strict=True):
            for i in range(n):
                q = self.q[first + i].double().cpu()
                stop = max(length - n + i + 1, 0)
                start = 0 if window is None else max(stop - window, 0)
                for h in range(q.shape[0]):
                    head = h // (q.shape[0] // k.shape[1])
                    scores = k[start:stop, head] @ q[h] * (scale or q.shape[1] ** -0.5)
                    if softcap is not None:
                        scores = softcap * torch.tanh(scores / softcap)
                    if sinks:  # a token whose value is 0
                        scores = torch.cat((scores, self.sinks[h].double().cpu().view(1)))
                    rows.append(scores.softmax(0)[: stop - start] @ v[start:stop, head])
            first += n
        return torch.stack(rows).view(first, self.q.shape[1], -1)


def assert_close(got, want, dtype):
    error = (got.double().cpu() - want).norm() / want.norm()
    assert error <= TOLERANCE[dtype], f"relative error {error:.2e}"
    # A row that is wrong alone drowns in the norm of many: check each on the scale of all.
    worst = (got.double().cpu() - want).abs().max() / want.abs().max()
    assert worst <= 8 * TOLERANCE[dtype], f"worst element {worst:.2e}"
