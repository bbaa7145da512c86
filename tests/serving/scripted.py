"""A server whose model writes what a test tells it, token by token, after <assistant>."""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from quatom.engine.config import EngineConfig
from quatom.engine.engine import Engine
from tests.engine.doubles import EOS, HashModel, byte_tokenizer, hash_loaded
from tests.serving.conftest import running_server

ASSISTANT = 259


@dataclass
class ScriptedModel(HashModel):
    """Writes `answer(prompt)`, one token for each byte or special token, then ends."""

    tokenizer: object = None
    answer: Callable[[str], str] = lambda prompt: ""
    begin: int = ASSISTANT
    """The token after which the answer begins."""
    message_end: int | None = None
    """The token that ends one of several messages in an answer."""
    prompts: list[str] = field(default_factory=list)
    """What it was asked, specials included."""
    _known: dict = field(default_factory=dict)

    def forward(self, input_ids, context, kv_cache, rows=None):
        cache = kv_cache[0]
        cache.write(context.slot_mapping, input_ids)
        cu = context.cu_seqlens_q.tolist()
        hidden = torch.zeros(len(input_ids), 2, dtype=torch.float64)
        for b, length in enumerate(context.seq_lens.tolist()):
            if length:  # rows in the middle of a prompt are not sampled
                token_ids = cache.read(context.block_tables[b], length).tolist()
                hidden[cu[b + 1] - 1, 0] = self._next(token_ids)
        return hidden if rows is None else hidden[rows]

    def _next(self, token_ids):
        if self.begin not in token_ids:
            return 0
        start = len(token_ids) - token_ids[::-1].index(self.begin)
        prompt = tuple(token_ids[:start])
        if prompt not in self._known:
            self.prompts.append(self.tokenizer.decode(prompt))
            answer = self.answer(self.prompts[-1])
            script = self.tokenizer.encode(answer, add_special_tokens=False)
            assert self.begin not in script
            self._known[prompt] = [*script, EOS]
        script, written = self._known[prompt], len(token_ids) - start
        return script[written] if written < len(script) else EOS

    def compute_logits(self, hidden):
        wanted = hidden[:, 0].long()
        ids = torch.arange(self.vocab_size)
        logits = ((wanted[:, None] * 31 + ids * 7907) % 1009).float() / 252.25
        # Under a constraint it comes to an end: brackets close, strings before them, and messages
        # of free text, which a token of their own ends, first of all.
        logits[:, [ord(c) for c in "]})"]] += 10.0
        logits[:, ord('"')] += 20.0
        if self.message_end is not None:
            logits[:, self.message_end] += 30.0
        logits[torch.arange(len(wanted)), wanted] = 60.0
        return logits


def scripted_tokenizer(template: str | None, special=()):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer


@contextmanager
def scripted_server(
    template, answer, *, special=(), begin="<assistant>", max_position=2048, **options
):
    """Yields what `running_server` does, and the model.

    Args:
        template: the chat template.
        answer: a text, or a function of the prompt that gives one.
        special: special tokens of the tokenizer.
        begin: the token after which the answer begins.
        max_position: the model's limit.
        options: of `ServerOptions`.
    """
    tokenizer = scripted_tokenizer(template, special)
    loaded = hash_loaded(tokenizer=tokenizer, max_position=max_position)
    loaded.model = ScriptedModel(
        tokenizer=tokenizer,
        answer=answer if callable(answer) else lambda prompt: answer,
        begin=tokenizer.convert_tokens_to_ids(begin),
        message_end=tokenizer.get_vocab().get("<|end|>"),
    )
    config = EngineConfig(
        max_num_seqs=16,
        max_num_batched_tokens=max_position,
        block_size=16,
        kv_cache_memory=4000 * 16 * 8,
    )
    with running_server(Engine(loaded, config), **options) as running:
        running.model = loaded.model
        yield running
