"""A model whose next token is a hash of every token before it, read through the paged cache.

Its cache stores token ids. A wrong slot, block table, copy, prefix hit or eviction changes what is
read back and so the tokens that follow: `expected_tokens` knows them without any cache.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

MODULUS = 2**31 - 1
VOCAB = 300
EOS = 257


def mix(state: int, token_id: int) -> int:
    return (state * 1_000_003 + token_id * 7919 + 12345) % MODULUS


def state_of(token_ids) -> int:
    state = 1
    for token_id in token_ids:
        state = mix(state, token_id)
    return state


def next_token(token_ids, vocab_size=VOCAB) -> int:
    """The most likely next token; never a special one."""
    return state_of(token_ids) % min(vocab_size, 256)


def expected_tokens(prompt, count, vocab_size=VOCAB) -> list[int]:
    """What greedy decoding gives."""
    token_ids = list(prompt)
    for _ in range(count):
        token_ids.append(next_token(token_ids, vocab_size))
    return token_ids[len(prompt) :]


@dataclass
class HashCache:
    """One layer of token ids, -7 where nothing was written."""

    ids: torch.Tensor  # (P, S)

    @property
    def bytes_per_block(self) -> int:
        return self.ids.shape[1] * 8

    def copy_blocks(self, source, target) -> None:
        assert not set(source.tolist()) & set(target.tolist())
        assert len(set(target.tolist())) == len(target)
        self.ids[target] = self.ids[source]


@dataclass
class HashModel:
    vocab_size: int = VOCAB
    steps: list = field(default_factory=list)
    """(new tokens, sequences) of every forward pass."""
    fail_on: int | None = None
    """A forward pass that sees this token raises."""
    nan_on: int | None = None
    """A row whose newest token is this one gets logits that are no numbers."""

    def allocate_kv_cache(self, num_blocks, block_size):
        return [HashCache(torch.full((num_blocks, block_size), -7, dtype=torch.int64))]

    def forward(self, input_ids, context, kv_cache):
        if self.fail_on is not None and self.fail_on in input_ids.tolist():
            raise RuntimeError("kernel failed")
        assert (input_ids >= 0).all()
        (cache,) = kv_cache
        size = cache.ids.shape[1]
        stored = context.slot_mapping >= 0
        slots = context.slot_mapping[stored]
        cache.ids[slots // size, slots % size] = input_ids[stored]
        hidden = torch.zeros(len(input_ids), 2, dtype=torch.float64)
        cu = context.cu_seqlens_q.tolist()
        self.steps.append((int(stored.sum()), sum(n > 0 for n in context.seq_lens.tolist())))
        assert max(b - a for a, b in pairwise(cu)) <= context.max_seqlen_q
        assert all(cu[i + 1] - cu[i] == 1 for i in range(context.num_decodes))
        for b, length in enumerate(context.seq_lens.tolist()):
            if not length:
                continue
            assert length <= context.max_seq_len
            table = context.block_tables[b, : -(-length // size)].long()
            token_ids = cache.ids[table].flatten()[:length].tolist()
            new = cu[b + 1] - cu[b]
            assert context.positions[cu[b] : cu[b + 1]].tolist() == list(
                range(length - new, length)
            )
            state = state_of(token_ids[: length - new])
            for i, token_id in enumerate(token_ids[length - new :]):
                state = mix(state, token_id)
                hidden[cu[b] + i, 0] = state
                hidden[cu[b] + i, 1] = float("nan") if token_id == self.nan_on else 0.0
        return hidden

    def compute_logits(self, hidden):
        states = hidden[:, 0].long()
        ids = torch.arange(self.vocab_size)
        # Pseudo-random logits in [0, 4), and a clear winner.
        logits = ((states[:, None] * 31 + ids * 7907) % 1009).float() / 252.25
        winner = states % min(self.vocab_size, 256)
        logits[torch.arange(len(states)), winner] = 6.0
        return logits + hidden[:, 1:].float()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte (ids 0 to 255), then special tokens; every byte sequence round-trips."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    byte_of = _byte_level_table()
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


def _byte_level_table() -> dict[str, int]:
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
        recipe=SimpleNamespace(name="hash"),
    )
