"""dots.llm1: corrected experts beside shared ones, norms of q and k, windows in some layers."""

from quatom.families.corrected import beside_shared, corrected_router, mixed, sparse_from
from quatom.families.decoder import Family, decoder, dense_feed, read_feed_forward
from quatom.families.keys import Keys
from quatom.families.rope import one_rope
from quatom.families.sizes import layer_types, read_sizes, windows
from quatom.families.spec import ModelConfig, Norm


def read(keys: Keys) -> ModelConfig:
    """What a Dots1ForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    sizes = read_sizes(keys, max_position=2048, kv_heads=32)
    dense = read_feed_forward(keys)
    experts = beside_shared(
        keys,
        sizes.hidden,
        dense.activation,
        corrected_router(keys, normalized=False),
        width=1408,
        count=None,
        top_k=None,
        shared=None,
    )
    sparse = sparse_from(sizes.layers, keys.integer("first_k_dense_replace", default=0, least=0))
    window = keys.integer_or_none("sliding_window", default=4096)
    full = keys.integer("max_window_layers", default=62, least=0)
    default = [
        "full_attention" if window is None or layer < full else "sliding_attention"
        for layer in range(sizes.layers)
    ]
    norm = Norm(eps=keys.positive("rms_norm_eps", default=1e-6))
    bias = keys.flag("attention_bias")
    return decoder(
        keys,
        sizes,
        one_rope(keys, sizes),
        family="dots1",
        norm=norm,
        feed_forward=mixed(sparse, dense_feed(dense, sizes.hidden), experts),
        windows=windows(layer_types(keys, default), window),
        qk_norm=norm,
        attention_bias=bias,
        output_bias=bias,
    )


DOTS1 = Family(
    name="dots1",
    architectures=("Dots1ForCausalLM",),
    model_type="dots1",
    models="dots.llm1",
    read=read,
)
