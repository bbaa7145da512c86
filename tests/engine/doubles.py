"""A model whose next token is a hash of every token before it, read through the paged cache.

It computes with integers, so its tokens are exact in any batch on any CPU. Its cache has two
layers: the first stores token ids, the second a hash of each token and all before it, as keys and
values of later layers depend on their whole prefix. A wrong slot, block table, copy, prefix hit or
eviction changes what is read back and so the tokens that follow: `expected_tokens` knows them
without any cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate, pairwise
from types import SimpleNamespace

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

MODULUS = 2**31 - 1  # a prime: what it multiplies can be undone
FACTOR = 1_000_003
VOCAB = 300
EOS = 257


@cache
def powers(base: int, count: int) -> np.ndarray:
    """base**1 to base**count."""
    steps = accumulate([base] * count, lambda power, factor: power * factor % MODULUS)
    return np.array(list(steps))


def mix(state: int, value: int) -> int:
    return (state * FACTOR + value * 7919 + 12345) % MODULUS


def hash_prefixes(values) -> np.ndarray:
    """A hash of each value and all before it: `mix` of the last hash and the value.

    h[n] = FACTOR**n * (1 + sum of term[i] / FACTOR**i), all at once; no number exceeds 63 bits.
    """
    count = len(values)
    room = max(1024, 1 << count.bit_length())
    terms = (np.asarray(values, dtype=np.int64) * 7919 + 12345) % MODULUS
    shares = terms * powers(pow(FACTOR, -1, MODULUS), room)[:count] % MODULUS
    return (1 + shares.cumsum()) % MODULUS * powers(FACTOR, room)[:count] % MODULUS


def state_of(token_ids) -> int:
    """What the logits after these tokens are made of: the second layer's hash of the first's."""
    return int(hash_prefixes(hash_prefixes(token_ids))[-1])


def next_token(state: int, vocab_size=VOCAB) -> int:
    """The most likely next token; never a special one."""
    return state % min(vocab_size, 256)


def expected_tokens(prompt, count, vocab_size=VOCAB) -> list[int]:
    """What greedy decoding gives."""
    token_ids = list(prompt)
    for _ in range(count):
        token_ids.append(next_token(state_of(token_ids), vocab_size))
    return token_ids[len(prompt) :]


@dataclass
class HashCache:
    """One layer of integers, -7 where nothing was written."""

    values: torch.Tensor  # (P, S) int32

    @property
    def bytes_per_block(self) -> int:
        return self.values.shape[1] * 4

    def write(self, slots, values) -> None:  # (T,) each; slot -1: not stored
        stored, size = slots >= 0, self.values.shape[1]
        slots = slots[stored]
        assert len(set(slots.tolist())) == len(slots)
        self.values[slots // size, slots % size] = values[stored].int()

    def read(self, table, length) -> np.ndarray:
        """The first `length` values of a sequence."""
        blocks = -(-length // self.values.shape[1])
        return self.values[table[:blocks].long()].flatten()[:length].numpy()

    def copy_blocks(self, source, target) -> None:
        assert not set(source.tolist()) & set(target.tolist())
        assert len(set(target.tolist())) == len(target)
        self.values[target] = self.values[source]


@dataclass
class HashModel:
    vocab_size: int = VOCAB
    steps: list = field(default_factory=list)
    """(new tokens, sequences) of every forward pass."""
    fail_on: Sequence[int] = ()
    """A forward pass that sees these tokens, one after another, raises."""
    nan_on: int = -1
    """A row whose newest token is this one gets logits that are no numbers."""
    blocks_run: int = 0

    def limit_length(self, max_length):
        pass

    def allocate_kv_cache(self, num_blocks, block_size):
        shape = (num_blocks, block_size)
        return [HashCache(torch.full(shape, -7, dtype=torch.int32)) for _ in range(2)]

    def forward(self, input_ids, context, kv_cache, rows=None):
        if self.fail_on and self._sees(input_ids.tolist(), list(self.fail_on)):
            raise RuntimeError("kernel failed")
        assert (input_ids >= 0).all()
        self._check(context)
        stored = int((context.slot_mapping >= 0).sum())
        self.steps.append((stored, sum(n > 0 for n in context.seq_lens.tolist())))
        values = input_ids
        for layer in kv_cache:
            layer.write(context.slot_mapping, values)
            values = self._attend(layer, context)
        broken = torch.where(input_ids == self.nan_on, torch.nan, 0.0)
        hidden = torch.stack((values.double(), broken.double()), dim=1)
        return hidden if rows is None else hidden[rows]

    def _attend(self, layer, context):  # -> (T,) int64
        """For each new token the hash of what the cache holds of its sequence up to it."""
        hashes = torch.zeros(len(context.positions), dtype=torch.int64)
        cu = context.cu_seqlens_q.tolist()
        for b, length in enumerate(context.seq_lens.tolist()):
            seen = hash_prefixes(layer.read(context.block_tables[b], length))
            if length:
                hashes[cu[b] : cu[b + 1]] = torch.from_numpy(seen[cu[b] - cu[b + 1] :])
        return hashes

    @staticmethod
    def _sees(token_ids, wanted):
        count = len(wanted)
        return any(token_ids[i : i + count] == wanted for i in range(len(token_ids) - count + 1))

    @staticmethod
    def _check(context):
        lengths, positions = context.seq_lens.tolist(), context.positions.tolist()
        ends = context.cu_seqlens_q.tolist()
        assert max(b - a for a, b in pairwise(ends)) <= context.max_seqlen_q
        assert all(b - a == 1 for a, b in list(pairwise(ends))[: context.num_decodes])
        assert max(lengths) <= context.max_seq_len
        for (first, last), length in zip(pairwise(ends), lengths, strict=True):
            if length:
                assert positions[first:last] == list(range(length - (last - first), length))

    def compute_logits(self, hidden):
        """Pseudo-random logits in [0, 4) that hold all 31 bits of the state, and a clear winner."""
        states = hidden[:, :1].long()
        ids = torch.arange(self.vocab_size)
        logits = ((states >> ids % 24 ^ ids * 57) & 255).float() / 64
        logits.scatter_(1, next_token(states, self.vocab_size), 6.0)
        return logits + hidden[:, 1:].float()

    def head_logits(self, hidden):
        return self.compute_logits(hidden)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte (ids 0 to 255), then special tokens; every byte sequence round-trips."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    byte_of = byte_level_table()
    vocab = {char: byte_of[char] for char in alphabet}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<eos>", "<user>", "<assistant>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    fast.chat_template = (
        "{% for m in messages %}<user>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return fast


def byte_level_table() -> dict[str, int]:
    """GPT-2's printable stand-in of every byte, and the byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def hash_loaded(vocab_size=VOCAB, max_position=512, tokenizer=None, **options) -> SimpleNamespace:
    """What `quatom.loading.load` would return for the hash model."""
    return SimpleNamespace(
        model=HashModel(vocab_size, **options),
        config=SimpleNamespace(
            vocab_size=vocab_size,
            eos_token_ids=(EOS,),
            bos_token_id=None,
            max_position=max_position,
            hidden_size=2,
        ),
        tokenizer=tokenizer,
        device=torch.device("cpu"),
        dtype=torch.float64,
        recipe=SimpleNamespace(name="hash"),
    )
