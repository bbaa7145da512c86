"""GLM-4.5: experts chosen by corrected sigmoids within groups, beside a shared expert."""

from quatom.families.corrected import beside_shared, corrected_router, mixed, sparse_from
from quatom.families.decoder import Family, decoder, dense_feed, read_feed_forward
from quatom.families.keys import Keys
from quatom.families.rope import one_rope
from quatom.families.sizes import read_sizes
from quatom.families.spec import ModelConfig, Norm


def read(keys: Keys) -> ModelConfig:
    """What a Glm4MoeForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    sizes = read_sizes(keys, max_position=131_072, kv_heads=8)
    drafts = keys.integer("num_nextn_predict_layers", "num_mtp_layers", default=1, least=0)
    dense = read_feed_forward(keys)
    experts = beside_shared(
        keys, sizes.hidden, dense.activation, corrected_router(keys), width=1408, count=128
    )
    sparse = sparse_from(sizes.layers, keys.integer("first_k_dense_replace", default=1, least=0))
    norm = Norm(eps=keys.positive("rms_norm_eps", default=1e-5))
    return decoder(
        keys,
        sizes,
        one_rope(keys, sizes, partial=0.5),
        family="glm4_moe",
        norm=norm,
        feed_forward=mixed(sparse, dense_feed(dense, sizes.hidden), experts),
        qk_norm=norm if keys.flag("use_qk_norm") else None,
        attention_bias=keys.flag("attention_bias"),
        # Layers that draft several tokens at once follow the decoder's own in the files.
        unused_layers=drafts,
    )


GLM4_MOE = Family(
    name="glm4_moe",
    architectures=("Glm4MoeForCausalLM",),
    model_type="glm4_moe",
    models="GLM-4.5 to 4.7, their Air variants",
    read=read,
)
