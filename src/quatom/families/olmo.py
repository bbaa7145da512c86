"""OLMo-2 and OLMo-3: norms after attention and feed-forward, norms over all heads of q and k."""

from quatom.errors import ModelError
from quatom.families.decoder import NORMS_AFTER, Family, decoder, read_feed_forward
from quatom.families.keys import Keys
from quatom.families.rope import Rotary, one_rope, ropes_by_layer_type
from quatom.families.sizes import Sizes, periodic_layer_types, read_sizes, windows
from quatom.families.spec import ModelConfig, Norm

_THETA = 500_000.0


def read_olmo2(keys: Keys) -> ModelConfig:
    """What an Olmo2ForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    sizes = read_sizes(keys, max_position=2048)
    return _read(keys, "olmo2", sizes, one_rope(keys, sizes), None)


def read_olmo3(keys: Keys) -> ModelConfig:
    """What an Olmo3ForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    if keys.value("rope_theta") not in (None, _THETA):
        raise ModelError(
            f"config key {keys.show('rope_theta')}: releases of transformers disagree on whether "
            "it holds for layers of sliding_attention; write rope_parameters with a rope_theta "
            "for full_attention and one for sliding_attention"
        )
    sizes = read_sizes(keys, max_position=2048)
    types = periodic_layer_types(keys, sizes.layers, every=4)
    rotary = ropes_by_layer_type(
        keys,
        sizes,
        types,
        theta={"full_attention": _THETA, "sliding_attention": _THETA},
        theta_names={"full_attention": "rope_theta", "sliding_attention": "rope_theta"},
    )
    window = keys.integer_or_none("sliding_window", default=4096)
    return _read(keys, "olmo3", sizes, rotary, windows(types, window))


def _read(
    keys: Keys, family: str, sizes: Sizes, rotary: Rotary, windows: tuple[int | None, ...] | None
) -> ModelConfig:
    norm = Norm(eps=keys.positive("rms_norm_eps", default=1e-5))
    bias = keys.flag("attention_bias")
    return decoder(
        keys,
        sizes,
        rotary,
        family=family,
        norm=norm,
        feed_forward=read_feed_forward(keys),
        windows=windows,
        qk_norm=norm,
        qk_norm_axis="all",
        attention_bias=bias,
        output_bias=bias,
        norms=NORMS_AFTER,
    )


OLMO2 = Family(
    name="olmo2",
    architectures=("Olmo2ForCausalLM",),
    model_type="olmo2",
    models="OLMo-2",
    read=read_olmo2,
)
OLMO3 = Family(
    name="olmo3",
    architectures=("Olmo3ForCausalLM",),
    model_type="olmo3",
    models="OLMo-3",
    read=read_olmo3,
)
