"""BlockPool: who holds which KV block, and which blocks hold a prefix that can be used again.

A block is free, held (reference count above zero), or both free and *cached*: nobody holds it, but
its contents are those of a known prefix and may be taken back until it is needed for something
else. Blocks never used come first when one is allocated, then the cached one released longest ago.

A prefix is known by the digest of its tokens: digest(block i) = blake2b(digest(block i - 1) ||
tokens of block i). Equal digests mean equal prefixes for all purposes, so nothing is compared.
"""

from array import array
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from hashlib import blake2b

from quatom.errors import EngineError

ROOT_DIGEST = b""


def block_digest(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Digest of a full block whose prefix has digest `parent`."""
    return blake2b(parent + array("q", token_ids).tobytes(), digest_size=16).digest()


class BlockPool:
    """Reference counts, prefix digests and eviction of `num_blocks` KV blocks."""

    def __init__(self, num_blocks: int, *, prefix_caching: bool = True) -> None:
        if num_blocks < 1:
            raise EngineError(f"the KV cache needs at least 1 block, got {num_blocks}")
        self.num_blocks = num_blocks
        self.prefix_caching = prefix_caching
        self._references = [0] * num_blocks
        self._digest_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._empty = deque(range(num_blocks))
        self._cached_free: OrderedDict[int, None] = OrderedDict()  # longest released first

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, cached ones included."""
        return len(self._empty) + len(self._cached_free)

    @property
    def usage(self) -> float:
        """Share of blocks held, 0 to 1."""
        return 1.0 - self.num_free / self.num_blocks

    def allocate(self) -> int:
        """A free block with reference count 1 and no digest.

        Raises:
            EngineError: no block is free; look at num_free first.
        """
        if self._empty:
            block = self._empty.popleft()
        elif self._cached_free:
            block, _ = self._cached_free.popitem(last=False)
            self._forget(block)
        else:
            raise EngineError(f"all {self.num_blocks} KV blocks are held; nothing to allocate")
        self._references[block] = 1
        return block

    def hold(self, block: int) -> None:
        """One more holder; takes a cached block back from the free ones."""
        if self._references[block] == 0:
            del self._cached_free[block]
        self._references[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """One holder fewer of each; blocks without one are free in the order given.

        Give a sequence's blocks last first, so that the start of a prefix outlives its end.
        """
        for block in blocks:
            if self._references[block] < 1:
                raise EngineError(f"KV block {block} is released more often than it was held")
            self._references[block] -= 1
            if self._references[block] == 0:
                if self._digest_of[block] is None:
                    self._empty.append(block)
                else:
                    self._cached_free[block] = None

    def match(self, digests: Iterable[bytes]) -> list[int]:
        """Blocks of the longest known prefix of `digests`; not held yet."""
        blocks: list[int] = []
        if not self.prefix_caching:
            return blocks
        for digest in digests:
            block = self._block_of.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def register(self, block: int, digest: bytes) -> bool:
        """Remember that held `block` now contains the full prefix block `digest`.

        If another block already does, that one stays known and this one remains anonymous.

        Returns:
            Whether `digest` was not known before.
        """
        if not self.prefix_caching or digest in self._block_of:
            return False
        self._forget(block)
        self._digest_of[block] = digest
        self._block_of[digest] = block
        return True

    def num_unheld(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` are free and cached: holding them uses up free blocks."""
        return sum(self._references[block] == 0 for block in blocks)

    def forget_prefixes(self) -> None:
        """Drop every known prefix (after the cache's contents became untrustworthy)."""
        for block in range(self.num_blocks):
            self._forget(block)
        self._empty.extend(self._cached_free)
        self._cached_free.clear()

    def check(self, held: Iterable[int]) -> None:
        """Assert the books: `held` lists every block table entry in the engine.

        Raises:
            EngineError: a block is lost, held by nobody, or free and held at once.
        """
        counts = [0] * self.num_blocks
        for block in held:
            counts[block] += 1
        if counts != self._references:
            wrong = [b for b in range(self.num_blocks) if counts[b] != self._references[b]]
            raise EngineError(f"reference counts of KV blocks {wrong[:8]} do not match their use")
        free = [*self._empty, *self._cached_free]
        if sorted(free) != [b for b in range(self.num_blocks) if counts[b] == 0]:
            raise EngineError(f"{len(free)} KV blocks are listed free; {counts.count(0)} are")
        known = {d: b for b, d in enumerate(self._digest_of) if d is not None}
        if known != self._block_of:
            raise EngineError("known prefixes and the digests of blocks do not match")

    def _forget(self, block: int) -> None:
        digest = self._digest_of[block]
        if digest is not None:
            self._digest_of[block] = None
            del self._block_of[digest]
