"""EXAONE 4: norms after attention and feed-forward, norms of q and k, windows with rotation."""

from quatom.errors import ModelError
from quatom.families.decoder import NORMS_AFTER, Family, decoder, read_feed_forward
from quatom.families.keys import Keys
from quatom.families.rope import Rotary, one_rope
from quatom.families.sizes import Sizes, layer_types, periodic_layer_types, read_sizes, windows
from quatom.families.spec import ModelConfig, Norm


def read(keys: Keys) -> ModelConfig:
    """What an Exaone4ForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    sizes = read_sizes(keys, max_position=2048, kv_heads=32)
    norm = Norm(eps=keys.positive("rms_norm_eps", default=1e-5))
    rotary, windows = read_attention(keys, sizes)
    return decoder(
        keys,
        sizes,
        rotary,
        family="exaone4",
        norm=norm,
        feed_forward=read_feed_forward(keys),
        windows=windows,
        qk_norm=norm,
        norms=NORMS_AFTER,
    )


def read_attention(keys: Keys, sizes: Sizes) -> tuple[Rotary, tuple[int | None, ...]]:
    """Rotary embedding and window of each layer.

    Raises:
        ModelError: a key is wrong or not supported.
    """
    window = keys.integer_or_none("sliding_window", default=4096)
    types = _layer_types(keys, sizes.layers, window)
    shared = one_rope(keys, sizes)
    # In a model with windows, layers that see everything do not turn their heads.
    ropes = tuple(
        None if window is not None and kind == "full_attention" else rope
        for rope, kind in zip(shared.ropes, types, strict=True)
    )
    return Rotary(ropes, shared.max_position), windows(types, window)


def _layer_types(keys: Keys, layers: int, window: int | None) -> tuple[str, ...]:
    """Of `layer_types`; where it is absent, every N-th layer sees everything."""
    pattern = keys.value("sliding_window_pattern")
    if keys.value("layer_types") is None and isinstance(pattern, str):
        raise ModelError(
            f"config key {keys.show('sliding_window_pattern')}: transformers reads a pattern of "
            "letters only beside layer_types; write layer_types, one entry per layer"
        )
    if window is None:
        return layer_types(keys, ("full_attention",) * layers)
    every = 4 if isinstance(pattern, str) else keys.integer("sliding_window_pattern", default=4)
    return periodic_layer_types(keys, layers, every=every)


EXAONE4 = Family(
    name="exaone4",
    architectures=("Exaone4ForCausalLM",),
    model_type="exaone4",
    models="EXAONE 4.0 1.2B and 32B",
    read=read,
)
