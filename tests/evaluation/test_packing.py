"""Packing: every sequence once, beginnings shared only where they are equal and not wanted."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quatom.evaluation.packing import KV_BLOCK_SIZE, Packed, num_kv_blocks, pack, packed_context
from quatom.loading import load

CPU = torch.device("cpu")

# Few tokens and beginnings from a short list, so that much is equal.
beginnings = st.sampled_from([(), (1,) * 16, (1,) * 33, (1,) * 16 + (2,) * 40])
sequences = st.lists(
    st.tuples(beginnings, st.lists(st.integers(1, 2), min_size=1, max_size=40)).map(
        lambda parts: (*parts[0], *parts[1])
    ),
    min_size=1,
    max_size=12,
)


@settings(deadline=None, max_examples=200)
@given(sequences=sequences, batch_tokens=st.integers(1, 200), data=st.data())
def test_batches_hold_every_sequence_once_and_share_what_is_equal(sequences, batch_tokens, data):
    computed = [data.draw(st.integers(1, len(tokens))) for tokens in sequences]
    batches = pack(sequences, computed, batch_tokens)
    packed = [item for batch in batches for item in batch]
    assert sorted(item.index for item in packed) == list(range(len(sequences)))
    for batch in batches:
        before = ()
        for item in batch:
            tokens = sequences[item.index]
            assert item.shared % KV_BLOCK_SIZE == 0
            assert item.shared <= len(tokens) - computed[item.index]
            assert tokens[: item.shared] == before[: item.shared]
            assert item.shared <= len(before)
            before = tokens
        size = sum(len(sequences[item.index]) - item.shared for item in batch)
        assert size <= batch_tokens or len(batch) == 1


def test_choices_of_a_question_share_its_whole_blocks():
    question = tuple(range(40))
    choices = [(*question, 50), (*question, 60, 61), (*question, 50, 51)]
    (batch,) = pack(choices, [1, 2, 2], 1000)
    assert batch == [Packed(0, 0), Packed(2, 32), Packed(1, 32)]


def test_tokens_whose_hidden_states_are_wanted_are_not_shared():
    same = [tuple(range(32))] * 2
    assert pack(same, [1, 16], 1000) == [[Packed(0, 0), Packed(1, 16)]]
    assert pack(same, [1, 17], 1000) == [[Packed(0, 0), Packed(1, 0)]]


def test_longest_come_first_and_full_batches_end():
    lengths = [3, 9, 5]
    batches = pack([[i] * length for i, length in enumerate(lengths)], [1, 1, 1], 8)
    assert [[item.index for item in batch] for batch in batches] == [[1], [2, 0]]


def test_block_tables_of_sharing_sequences_begin_alike():
    shared, capacities = [0, 32, 0, 16], [40, 35, 20, 18]
    context = packed_context(shared, [40, 3, 20, 2], capacities, CPU, shared)
    assert context.block_tables.tolist() == [[0, 1, 2], [0, 1, 3], [4, 5, 0], [4, 6, 0]]
    assert context.slot_mapping[40:43].tolist() == [48, 49, 50]
    assert context.positions[40:43].tolist() == [32, 33, 34]
    assert context.slot_mapping[63:].tolist() == [96, 97]
    assert context.cu_seqlens_q.tolist() == [0, 40, 43, 63, 65]
    assert context.seq_lens.tolist() == capacities
    assert num_kv_blocks(capacities, shared) == 7


def test_room_to_grow_keeps_the_layout_from_call_to_call():
    first = packed_context([0, 0], [5, 17], [20, 40], CPU)
    later = packed_context([5, 17], [1, 1], [20, 40], CPU)
    assert torch.equal(first.block_tables, later.block_tables)
    assert later.slot_mapping.tolist() == [5, 2 * 16 + 17]


@pytest.mark.parametrize("fixture", ["tiny_llama_dir", "tiny_qwen2_dir"])
def test_hidden_states_are_those_of_each_sequence_alone(fixture, request):
    """Packed, shared and alone differ by the order of float32 sums only."""
    loaded = load(request.getfixturevalue(fixture))
    torch.manual_seed(0)
    question = torch.randint(0, 256, (45,)).tolist()
    tails = ([1, 2, 3], [4], [1, 2, 3, 9, 9, 9, 9, 9])
    tokens = [question + tail for tail in tails] + [[7] * 20, [7] * 19 + [8]]

    def run(batch):
        shared = [item.shared for item in batch]
        inputs = [tokens[item.index] for item in batch]
        new = [sequence[start:] for sequence, start in zip(inputs, shared, strict=True)]
        lengths = [len(sequence) for sequence in inputs]
        context = packed_context(shared, [len(n) for n in new], lengths, CPU, shared)
        cache = loaded.model.allocate_kv_cache(num_kv_blocks(lengths, shared), KV_BLOCK_SIZE)
        ids = torch.tensor([token for sequence in new for token in sequence])
        with torch.no_grad():
            hidden = loaded.model(ids, context, cache)
        ends = context.cu_seqlens_q.tolist()[1:]
        return {item.index: hidden[end - 1] for item, end in zip(batch, ends, strict=True)}

    (batch,) = pack(tokens, [1] * len(tokens), 1000)
    # The third tail begins like the first.
    assert [item.shared for item in batch] == [0, 48, 32, 0, 16]
    together = run(batch)
    for index in range(len(tokens)):
        alone = run([Packed(index, 0)])[index]
        # float32, relative to the largest value: 2**-24 times the depth of the sums, about 2**10.
        torch.testing.assert_close(
            together[index], alone, rtol=0, atol=float(alone.abs().max()) * 2**-14
        )
