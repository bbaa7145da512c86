"""Every family computes what transformers computes: whole prompts, and token by token."""

import pytest
import torch

from quatom.loading import load
from quatom.modeling.context import full_sequences_context
from tests.families.models import TINY, decode_context, save_tiny, tiny_model

LENGTH = 72
"""Tokens of the text: longer than every window, than a KV block, than yarn's and llama3's
pre-training lengths where they are tiny."""
BLOCK = 16


@pytest.fixture(scope="module", params=TINY)
def pair(request, tmp_path_factory):
    """A family's model in transformers and in Quatom, a text, and transformers' logits."""
    name = request.param
    folder = save_tiny(tmp_path_factory.mktemp("families") / name, name)
    loaded = load(folder)
    loaded.model.limit_length(LENGTH)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 256, (LENGTH,), generator=generator)
    with torch.no_grad():
        want = tiny_model(name)(tokens[None]).logits[0]
    return loaded, tokens, want


@torch.inference_mode()
def test_a_prompt_gives_the_logits_of_transformers(pair):
    loaded, tokens, want = pair
    model = loaded.model
    context = full_sequences_context(1, LENGTH, BLOCK, loaded.device)
    cache = model.allocate_kv_cache(-(-LENGTH // BLOCK), BLOCK)
    got = model.compute_logits(model(tokens, context, cache))
    # Logits are of order 1; float32 sums of a few hundred terms in another order differ by 1e-6
    # each, and a few layers magnify that.
    assert (got - want).abs().max() < 1e-3


@torch.inference_mode()
def test_decoding_gives_the_logits_of_transformers(pair):
    loaded, tokens, want = pair
    model = loaded.model
    cache = model.allocate_kv_cache(-(-LENGTH // BLOCK), BLOCK)
    got = torch.cat(
        [
            model.compute_logits(model(token[None], decode_context(position, BLOCK), cache))
            for position, token in enumerate(tokens)
        ]
    )
    assert (got - want).abs().max() < 1e-3  # as above
