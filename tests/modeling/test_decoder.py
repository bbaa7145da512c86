"""The decoder against transformers, and the paged cache against one full pass."""

import pytest
import torch

from quatom.errors import CheckpointError
from quatom.loading import load
from quatom.modeling.context import ForwardContext, full_sequences_context
from tests.conftest import LLAMA, LLAMA3_SCALING, QWEN2, make_model
from tests.families.models import save_tiny

KV_BLOCK = 16
TOKENS = torch.randint(0, 320, (50,), generator=torch.Generator().manual_seed(0))

MODELS = {
    "llama": LLAMA,
    "qwen2: biases, tied embeddings": QWEN2,
    "llama 3 rope scaling": LLAMA | {"rope_scaling": LLAMA3_SCALING | {"rope_theta": 5e5}},
    "linear rope scaling": LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "head_dim 128": LLAMA | {"num_attention_heads": 2, "num_key_value_heads": 1},
    "head_dim that is not hidden / heads": LLAMA | {"head_dim": 128},
    "multi-head attention": LLAMA | {"num_key_value_heads": 4},
    "biases everywhere": LLAMA | {"attention_bias": True, "mlp_bias": True},
    "tied llama": LLAMA | {"tie_word_embeddings": True},
    "sliding window": QWEN2
    | {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 0},
}
SAVED = {
    "bfloat16": dict(dtype=torch.bfloat16),
    "float16": dict(dtype=torch.float16),
    "shards": dict(max_shard_size="500KB"),
}

# Everything is float32 here and differs by the order of sums alone. The planted outliers make
# scores of some hundreds, which float32 holds to 2e-5: softmax weights, and what follows from
# them, are good to a few 1e-5 of themselves. Most tokens agree to 1e-7.
SAME = 5e-5


@torch.no_grad()
def our_logits(loaded, tokens):
    context = full_sequences_context(1, len(tokens), KV_BLOCK, torch.device("cpu"))
    cache = loaded.model.allocate_kv_cache(context.block_tables.numel(), KV_BLOCK)
    return loaded.model.compute_logits(loaded.model(tokens, context, cache))


@torch.no_grad()
def their_logits(folder, tokens):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model(tokens[None]).logits[0]


def assert_same_logits(folder):
    got, want = our_logits(load(folder), TOKENS), their_logits(folder, TOKENS)
    assert want.std() > 0.5
    assert (got - want).abs().max() <= SAME * want.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name, tmp_path):
    assert_same_logits(make_model(tmp_path / "model", MODELS[name], seed=4))


@pytest.mark.parametrize("name", SAVED)
def test_logits_of_folders_saved_otherwise(name, tmp_path):
    folder = make_model(tmp_path / "model", LLAMA, **SAVED[name])
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (name == "shards")
    assert_same_logits(folder)


def context_of(pieces: list[tuple[int, int]], tables: list[list[int]]) -> ForwardContext:
    """New tokens (first position, count) of each sequence, and its KV blocks."""
    positions = [torch.arange(first, first + count) for first, count in pieces]
    slots = [
        torch.tensor(table)[at // KV_BLOCK] * KV_BLOCK + at % KV_BLOCK
        for at, table in zip(positions, tables, strict=True)
    ]
    counts = torch.tensor([0] + [count for _, count in pieces])
    lengths = [first + count for first, count in pieces]
    width = max(map(len, tables))
    return ForwardContext(
        positions=torch.cat(positions),
        slot_mapping=torch.cat(slots),
        block_tables=torch.tensor([t + [0] * (width - len(t)) for t in tables]).int(),
        cu_seqlens_q=counts.cumsum(0).int(),
        seq_lens=torch.tensor(lengths).int(),
        max_seqlen_q=int(counts.max()),
        max_seq_len=max(lengths),
    )


@torch.no_grad()
@pytest.mark.parametrize("fixture", ["tiny_llama_dir", "tiny_qwen2_dir"])
def test_chunks_then_single_tokens_equal_one_pass(fixture, request):
    loaded = load(request.getfixturevalue(fixture))
    want = our_logits(loaded, TOKENS)
    cache = loaded.model.allocate_kv_cache(8, KV_BLOCK)
    table = [[6, 1, 3, 4]]  # blocks in no order
    pieces, first = [], 0
    for count in [7, 16, 20] + [1] * 7:
        context = context_of([(first, count)], table)
        hidden = loaded.model(TOKENS[first : first + count], context, cache)
        pieces.append(loaded.model.compute_logits(hidden))
        first += count
    assert first == len(TOKENS)
    assert (torch.cat(pieces) - want).abs().max() <= SAME * want.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("fixture", ["tiny_llama_dir", "tiny_qwen2_dir"])
def test_a_mixed_batch_equals_each_sequence_alone(fixture, request):
    """Two decodes, a later chunk and a whole prefill in one step."""
    loaded = load(request.getfixturevalue(fixture))
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(0, 320, (n,), generator=generator) for n in (33, 17, 40, 21)]
    tables = [[0, 5, 2], [7, 1], [3, 8, 4], [9, 6]]
    known = [32, 16, 25, 0]
    cache = loaded.model.allocate_kv_cache(10, KV_BLOCK)
    for text, table, count in zip(texts, tables, known, strict=True):
        if count:
            loaded.model(text[:count], context_of([(0, count)], [table]), cache)
    pieces = [(k, len(t) - k) for k, t in zip(known, texts, strict=True)]
    new = torch.cat([text[k:] for text, k in zip(texts, known, strict=True)])
    context = context_of(pieces, tables)
    got = loaded.model.compute_logits(loaded.model(new, context, cache))
    first = 0
    for text, (position, count) in zip(texts, pieces, strict=True):
        want = our_logits(loaded, text)[position:]
        difference = (got[first : first + count] - want).abs().max()
        assert difference <= SAME * want.abs().max()
        first += count


@torch.no_grad()
def test_tokens_that_are_not_stored_leave_the_cache_alone(tiny_llama_dir):
    loaded = load(tiny_llama_dir)
    cache = loaded.model.allocate_kv_cache(2, KV_BLOCK)
    context = context_of([(0, 4)], [[1]])
    before = [pages.storage.clone() for pages in cache]
    unstored = ForwardContext(
        positions=context.positions,
        slot_mapping=torch.full((4,), -1),
        block_tables=context.block_tables,
        cu_seqlens_q=context.cu_seqlens_q,
        seq_lens=context.seq_lens,
        max_seqlen_q=4,
        max_seq_len=4,
    )
    loaded.model(TOKENS[:4], unstored, cache)
    assert all(torch.equal(p.storage, b) for p, b in zip(cache, before, strict=True))


# A parallel layer, norms after the layers, experts that are added up later, and one that is shared.
@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "cohere", "gemma2", "olmo2", "mixtral", "qwen2_moe"])
def test_hidden_states_of_wanted_tokens_are_theirs_among_all(name, tmp_path):
    loaded = load(save_tiny(tmp_path / "model", name))
    context = context_of([(0, 1), (0, 20), (0, 13)], [[4], [2, 0], [3]])
    tokens = torch.randint(0, 256, (34,), generator=torch.Generator().manual_seed(2))
    caches = [loaded.model.allocate_kv_cache(5, KV_BLOCK) for _ in range(3)]
    want = loaded.model(tokens, context, caches[0])
    rows = torch.tensor([0, 20, 33, 7])
    got = loaded.model(tokens, context, caches[1], rows)
    assert (got - want[rows]).abs().max() <= SAME * want.abs().max()
    none = loaded.model(tokens, context, caches[2], rows[:0])
    assert none.shape == (0, want.shape[1])
    # The next step reads of every token, in every layer, what it would have found.
    for pages, *others in zip(*caches, strict=True):
        assert all(torch.equal(pages.storage, other.storage) for other in others)


@torch.no_grad()
def test_after_the_last_attention_wanted_tokens_alone_are_computed(tmp_path):
    loaded = load(save_tiny(tmp_path / "model", "mixtral"))
    seen = []
    for block in loaded.model.blocks:
        block.router.register_forward_hook(lambda _, given, __: seen.append(len(given[0])))
    cache = loaded.model.allocate_kv_cache(2, KV_BLOCK)
    context = context_of([(0, 30)], [[1, 0]])
    loaded.model(torch.arange(30), context, cache, torch.tensor([29, 3]))
    assert seen == [30] * (len(loaded.model.blocks) - 1) + [2]
    seen.clear()
    loaded.model(torch.arange(30), context, cache, torch.tensor([], dtype=torch.int64))
    assert seen == [30] * (len(loaded.model.blocks) - 1)


def test_the_batch_context_places_sequences_side_by_side():
    context = full_sequences_context(2, 20, 16, torch.device("cpu"))
    assert context.block_tables.tolist() == [[0, 1], [2, 3]]
    assert context.slot_mapping.tolist() == [*range(20), *range(32, 52)]
    assert context.positions.tolist() == [*range(20)] * 2
    assert context.cu_seqlens_q.tolist() == [0, 20, 40]
    assert context.seq_lens.tolist() == [20, 20]


def test_an_untied_head_that_is_missing_is_refused(tmp_path):
    folder = make_model(tmp_path / "model", LLAMA | {"tie_word_embeddings": True})
    config = (folder / "config.json").read_text()
    untied = config.replace('"tie_word_embeddings": true', '"tie_word_embeddings": false')
    assert untied != config
    (folder / "config.json").write_text(untied)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        load(folder)
