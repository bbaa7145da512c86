"""The paged KV cache of one layer: what a block holds, how tokens enter it and come back.

A quantized cache keeps, for each token and KV head, D codes of K, D codes of V and one float16
pair (scale, minimum) for each of the two:

    minimum = float16(min)                              (of the D channels)
    scale   = float16((max - minimum) / largest_code), at least 2**-14
    code    = clamp(round_half_even((x - minimum) / scale), 0, largest_code)
    real    = code * scale + minimum

so one-sided and constant groups come out right without an integer zero point. With clip_ratio c < 1
both ends of the range first move towards its middle by (1 - c) / 2 of its width.

A block stores one contiguous record for each KV head (S tokens per block, D channels; INT4 shown):

    | K codes (S, D / 2) | V codes (S, D / 2) | K pairs (S, 2) float16 | V pairs (S, 2) float16 |

Byte j of an INT4 row holds channel j in its low nibble and channel j + D / 2 in its high one: the
halves that rotary embedding pairs come apart by a mask, and a 4-byte word of a row unpacks into
tensor-core operands without a shuffle. INT8 rows are (S, D) bytes; floating-point caches keep
(S, D) values and no pairs.
"""

from dataclasses import dataclass
from typing import Literal, Self, get_args

import torch
from torch import Tensor

from quatom.errors import ShapeError
from quatom.numerics.kv_codes import (
    asymmetric_codes,
    asymmetric_range,
    pack_halves,
    unpack_halves,
)
from quatom.numerics.kv_plans import AppendPlan, GatherPlan

KVDtype = Literal["int4", "int8", "float16", "bfloat16", "float32"]
HEAD_DIMS = (64, 80, 96, 100, 112, 128, 192, 256)
BLOCK_MULTIPLE = 16
"""Tokens per block must be a multiple of this: the rows of a tensor-core tile."""


def check_head_dim(head_dim: int) -> None:
    """Raise ShapeError if the paged cache has no heads of this size."""
    if head_dim not in HEAD_DIMS:
        raise ShapeError(
            f"head_dim {head_dim} is not supported; the paged cache has "
            f"{', '.join(map(str, HEAD_DIMS))}"
        )


@dataclass(frozen=True, slots=True)
class KVPages:
    """K and V of one layer in P blocks of S tokens, quantized or not."""

    storage: (
        Tensor  # (P, KV, record_bytes) uint8, contiguous; the layout is in the module docstring
    )
    block_size: int
    """S: tokens per block."""
    head_dim: int
    """D: channels per head."""
    dtype: KVDtype
    """Format of a cached value."""

    @classmethod
    def allocate(
        cls,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: KVDtype,
        device: torch.device | str,
    ) -> Self:
        """Zero-filled pages.

        Raises:
            ShapeError: a size that no kernel supports.
        """
        if dtype not in get_args(KVDtype):
            raise ShapeError(
                f"KV dtype must be one of {', '.join(get_args(KVDtype))}, got {dtype!r}"
            )
        check_head_dim(head_dim)
        if block_size < BLOCK_MULTIPLE or block_size % BLOCK_MULTIPLE:
            raise ShapeError(
                f"block_size {block_size} is not a positive multiple of {BLOCK_MULTIPLE} tokens"
            )
        if num_blocks < 1 or num_kv_heads < 1:
            raise ShapeError(f"cannot allocate {num_blocks} blocks of {num_kv_heads} KV heads")
        record = block_size * bytes_per_token_head(head_dim, dtype)
        storage = torch.zeros((num_blocks, num_kv_heads, record), dtype=torch.uint8, device=device)
        return cls(storage, block_size, head_dim, dtype)

    @property
    def num_blocks(self) -> int:
        """P."""
        return self.storage.shape[0]

    @property
    def num_kv_heads(self) -> int:
        """KV."""
        return self.storage.shape[1]

    @property
    def bits(self) -> int:
        """Bits a cached value, pairs not counted."""
        return _BITS[self.dtype]

    @property
    def quantized(self) -> bool:
        """Whether values are codes with (scale, minimum) pairs."""
        return self.dtype in ("int4", "int8")

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's K and V, all heads of this layer, pairs included."""
        return self.num_kv_heads * bytes_per_token_head(self.head_dim, self.dtype)

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block of this layer."""
        return self.block_size * self.bytes_per_token

    @property
    def keys(self) -> Tensor:
        """View (P, KV, S, D / 2) uint8 for INT4, (P, KV, S, D) uint8 or floats otherwise."""
        return self._rows(self.storage)[:, :, 0]

    @property
    def values(self) -> Tensor:
        """View like `keys`."""
        return self._rows(self.storage)[:, :, 1]

    @property
    def key_pairs(self) -> Tensor:
        """View (P, KV, S, 2) float16: scale and minimum of each K row of a quantized cache."""
        return self._pairs(self.storage)[:, :, 0]

    @property
    def value_pairs(self) -> Tensor:
        """View (P, KV, S, 2) float16: scale and minimum of each V row of a quantized cache."""
        return self._pairs(self.storage)[:, :, 1]

    def _row_bytes(self) -> int:
        return self.head_dim * self.bits // 8

    def _rows(self, records: Tensor) -> Tensor:  # (..., record_bytes) -> (..., 2, S, X)
        """View of the rows of K, then of V."""
        rows = records[..., : 2 * self.block_size * self._row_bytes()]
        rows = rows.unflatten(-1, (2, self.block_size, self._row_bytes()))
        return rows if self.quantized else rows.view(getattr(torch, self.dtype))

    def _pairs(self, records: Tensor) -> Tensor:  # (..., record_bytes) -> (..., 2, S, 2) float16
        """View of the (scale, minimum) pairs of K, then of V."""
        if not self.quantized:
            raise ShapeError(f"a {self.dtype} cache has no (scale, minimum) pairs")
        pairs = records[..., 2 * self.block_size * self._row_bytes() :].view(torch.float16)
        return pairs.unflatten(-1, (2, self.block_size, 2))

    def append(
        self,
        k: Tensor,  # (T, KV, D) floating
        v: Tensor,  # (T, KV, D) floating
        slot_mapping: Tensor,  # (T,) int64: block * S + offset, or -1 to skip the token
        clip_ratio: float = 1.0,
    ) -> None:
        """Write tokens into their slots, in place. This is the specification of the kernels.

        Raises:
            ShapeError: shapes disagree.
        """
        expected = (slot_mapping.shape[0], self.num_kv_heads, self.head_dim)
        if k.shape != expected or v.shape != expected:
            raise ShapeError(
                f"append expects k and v {expected} for {expected[0]} slots, got "
                f"{tuple(k.shape)} and {tuple(v.shape)}"
            )
        self.append_planned(k, v, self.plan_append(slot_mapping), clip_ratio)

    def plan_append(self, slot_mapping: Tensor) -> AppendPlan:  # (T,) int64, as in `append`
        """Where `append_planned` writes tokens with these slots."""
        kept = slot_mapping >= 0
        tokens = None
        if not kept.all():
            tokens = kept.nonzero().squeeze(1)
            slot_mapping = slot_mapping.index_select(0, tokens)
        device = slot_mapping.device
        row, pair = (x // self._word.itemsize for x in (self._row_bytes(), self._pair_bytes))
        record = 2 * self.block_size * (row + pair)
        head = torch.arange(self.num_kv_heads, device=device)[:, None, None]  # (KV, 1, 1)
        kind = torch.arange(2, device=device)[:, None]  # (2, 1): K, V
        block, offset = (
            x[:, None, None, None]
            for x in (slot_mapping // self.block_size, slot_mapping % self.block_size)
        )
        first = (block * self.num_kv_heads + head) * record  # of the token's record
        line = kind * self.block_size + offset  # of 2 S rows, and of 2 S pairs
        words = first + line * row + torch.arange(row, device=device)
        if pair:
            pairs = first + 2 * self.block_size * row + line * pair
            words = torch.cat((words, pairs + torch.arange(pair, device=device)), dim=-1)
        return AppendPlan(tokens, words.flatten())

    def append_planned(
        self,
        k: Tensor,  # (T, KV, D) floating
        v: Tensor,  # (T, KV, D) floating
        plan: AppendPlan,
        clip_ratio: float = 1.0,
    ) -> None:
        """`append` into the slots of a plan."""
        new = torch.stack((k, v), dim=2)  # (T, KV, 2, D)
        if plan.tokens is not None:
            new = new.index_select(0, plan.tokens)
        if self.quantized:
            scale, minimum = asymmetric_range(new, self.bits, clip_ratio)
            codes = asymmetric_codes(new, scale, minimum, self.bits)
            rows = pack_halves(codes) if self.bits == 4 else codes
            pairs = torch.cat((scale, minimum), dim=-1)
            new = torch.cat((rows.view(self._word), pairs.view(self._word)), dim=-1)
        flat = self.storage.view(-1).view(self._word)
        flat.scatter_(0, plan.words, new.to(self._word).flatten())

    def gather(
        self,
        block_table: Tensor,  # (max_blocks,) int32 or int64, the sequence's blocks in order
        length: int,
    ) -> tuple[Tensor, Tensor]:
        """K and V of a sequence's first `length` tokens, two (length, KV, D) float32 tensors."""
        tables = block_table[None, : -(-length // self.block_size)]
        k, v = self.gather_planned(self.plan_gather(tables, tables.new_tensor([length])))
        return k[0, :, :length].transpose(0, 1), v[0, :, :length].transpose(0, 1)

    def plan_gather(
        self,
        block_tables: Tensor,  # (B, n) int32 or int64, n blocks of each sequence
        seq_lens: Tensor,  # (B,) int32 or int64, up to n * S
    ) -> GatherPlan:
        """Where `gather_planned` finds the tokens of these blocks."""
        device = block_tables.device
        # Of the codes of K or V, of their pairs, and of a record.
        pieces, pair = (
            x * self.block_size // self._piece_bytes for x in (self._row_bytes(), self._pair_bytes)
        )
        each = 2 * (pieces + pair)
        heads = torch.arange(self.num_kv_heads, device=device)[:, None]
        first = (block_tables.long()[:, None] * self.num_kv_heads + heads) * each  # (B, KV, n)
        kind = torch.arange(2, device=device).view(2, 1, 1, 1)
        rows = (first + kind * pieces).unsqueeze(-1) + torch.arange(pieces, device=device)
        pairs = (first + 2 * pieces + kind * pair).unsqueeze(-1) + torch.arange(pair, device=device)
        batch, blocks = block_tables.shape
        token = torch.arange(blocks * self.block_size, device=device)
        return GatherPlan(
            shape=(2, batch, self.num_kv_heads, blocks * self.block_size),
            rows=rows.flatten(),
            pairs=pairs.flatten() if pair else None,
            written=-(token < seq_lens[:, None]).int().unsqueeze(1),
        )

    def gather_planned(self, plan: GatherPlan) -> Tensor:
        """K and V of all tokens of a plan's blocks, (2, B, KV, n * S, D) float32.

        Slots from seq_lens on, which nothing may have been written to, read as zeros.
        """
        pieces = self.storage.view(-1, self._piece_bytes)
        rows = pieces.index_select(0, plan.rows)
        if plan.pairs is None:
            values = rows.view(self._word).view(*plan.shape, self.head_dim).float()
            return values.masked_fill_((plan.written == 0).unsqueeze(-1), 0.0)
        rows = rows.view(*plan.shape, self._row_bytes())
        codes = unpack_halves(rows) if self.bits == 4 else rows
        words = pieces.index_select(0, plan.pairs).view(torch.int32).view(*plan.shape, 1)
        words &= plan.written.unsqueeze(-1)  # a pair of zeros turns any codes into zeros
        scale, minimum = words.view(torch.float16).float().split(1, dim=-1)
        return codes.float().mul_(scale).add_(minimum)  # the product is exact: one rounding

    @property
    def _pair_bytes(self) -> int:
        return 4 if self.quantized else 0

    @property
    def _word(self) -> torch.dtype:
        """What `append` writes at once: a value, or 4 bytes of a quantized row or pair, or 2."""
        if not self.quantized:
            return getattr(torch, self.dtype)
        return torch.int16 if self._row_bytes() % 4 else torch.int32

    @property
    def _piece_bytes(self) -> int:
        """What `gather` reads at once: a part of a block that divides its codes and its pairs."""
        return self.block_size * (self._word.itemsize if self.quantized else self._row_bytes())

    def copy_blocks(
        self,
        source: Tensor,  # (n,) int64
        target: Tensor,  # (n,) int64, distinct and disjoint from source
    ) -> None:
        """Copy whole blocks, in place: copy-on-write of shared prefixes."""
        self.storage.index_copy_(0, target, self.storage.index_select(0, source))


_BITS = {"int4": 4, "int8": 8, "float16": 16, "bfloat16": 16, "float32": 32}


def bytes_per_token_head(head_dim: int, dtype: KVDtype) -> int:
    """Bytes of one token and KV head, K and V together."""
    pair = 4 if dtype in ("int4", "int8") else 0
    return 2 * (head_dim * _BITS[dtype] // 8 + pair)
