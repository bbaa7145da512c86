"""Ministral 3: Mistral with yarn, whose queries grow with their position."""

from quatom.errors import ModelError
from quatom.families.decoder import Family, decoder, read_feed_forward
from quatom.families.keys import Keys
from quatom.families.rope import Rotary, one_rope
from quatom.families.sizes import Sizes, read_sizes, same_window
from quatom.families.spec import ModelConfig, Norm, QueryGrowth, Rope, RopeScaling

_SECTIONS = ("rope_parameters", "rope_scaling")
_THETA, _BETA = 1e6, 0.1
_YARN = RopeScaling(kind="yarn", factor=16.0, original_max_position=16_384)
"""Of a config.json that says nothing of rotary embedding, with _THETA and _BETA."""


def read(keys: Keys) -> ModelConfig:
    """What a Ministral3ForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    sizes = read_sizes(keys, max_position=262_144, kv_heads=8, head_dim=128)
    rotary, growth = _rotary(keys, sizes)
    window = keys.integer_or_none("sliding_window", default=None)
    return decoder(
        keys,
        sizes,
        rotary,
        family="ministral3",
        norm=Norm(eps=keys.positive("rms_norm_eps", default=1e-5)),
        feed_forward=read_feed_forward(keys),
        windows=same_window(keys, sizes.layers, window),
        query_growth=growth,
    )


def _rotary(keys: Keys, sizes: Sizes) -> tuple[Rotary, QueryGrowth | None]:
    keys.ignore(*(f"{section}.max_position_embeddings" for section in _SECTIONS))
    said = any(keys.under(f"{section}.") for section in _SECTIONS)
    if not said:
        keys.only("rope_theta", _THETA)  # transformers passes over another one here
    rotary = one_rope(keys, sizes, theta=10_000.0 if said else _THETA, scaling=_YARN)
    rope = rotary.ropes[0]
    assert rope is not None
    return rotary, _growth(keys, rope, None if said else _BETA)


def _growth(keys: Keys, rope: Rope, default: float | None) -> QueryGrowth | None:
    names = tuple(f"{section}.llama_4_scaling_beta" for section in _SECTIONS)
    beta = keys.number(*names, default=default)
    if beta == 0.0:
        return None
    scaling = rope.scaling
    if scaling is None or scaling.kind != "yarn" or scaling.original_max_position is None:
        raise ModelError(
            f"llama_4_scaling_beta {beta} lets queries grow beyond the pre-training length, which "
            "rope_type yarn alone has; write 0 there, or yarn's entries"
        )
    return QueryGrowth(beta=beta, length=scaling.original_max_position)


MINISTRAL3 = Family(
    name="ministral3",
    architectures=("Ministral3ForCausalLM",),
    model_type="ministral3",
    models="Ministral 3 (3B, 8B, 14B; its language part), Devstral 2",
    read=read,
)
