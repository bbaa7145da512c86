"""Sizes of a decoder, and which of its layers have a sliding window."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quatom.errors import ModelError
from quatom.families.keys import Keys

_FULL, _SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What every config.json has."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_position: int
    """max_position_embeddings: tokens, before any rotary scaling."""


GPT: Mapping[str, str] = {
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "max_position_embeddings": "n_positions",
}
"""What files of GPT-2 and its relatives call sizes."""


def read_sizes(
    keys: Keys,
    *,
    max_position: int,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    spellings: Mapping[str, str] | None = None,
) -> Sizes:
    """Sizes of a decoder, with a family's defaults.

    Args:
        keys: of config.json.
        max_position: Default of max_position_embeddings.
        kv_heads: Default of num_key_value_heads; None: as many as query heads.
        head_dim: Default of head_dim; None: hidden_size / num_attention_heads.
        spellings: Key -> another name of it in this family's files.

    Raises:
        ModelError: one is missing or wrong.
    """

    def size(name: str, default: int | None = None) -> int:
        other = (spellings or {}).get(name)
        return keys.integer(*((other, name) if other else (name,)), default=default)

    hidden = size("hidden_size")
    heads = size("num_attention_heads")
    head_dim = keys.integer_or_none("head_dim", default=head_dim)
    if head_dim is None:
        if hidden % heads:
            raise ModelError(
                f"hidden_size {hidden} is not a multiple of num_attention_heads {heads} and "
                "config.json has no head_dim; add it"
            )
        head_dim = hidden // heads
    return Sizes(
        hidden=hidden,
        layers=size("num_hidden_layers"),
        heads=heads,
        kv_heads=keys.integer_or_none("num_key_value_heads", default=kv_heads) or heads,
        head_dim=head_dim,
        max_position=size("max_position_embeddings", max_position),
    )


def fixed_heads(keys: Keys, sizes: Sizes, *, kv_heads: int | None = None) -> None:
    """For families whose classes read neither num_key_value_heads nor head_dim.

    Args:
        keys: of config.json.
        sizes: from `read_sizes`.
        kv_heads: What they have; None: as many as query heads.

    Raises:
        ModelError: config.json says something else.
    """
    keys.only("num_key_value_heads", kv_heads or sizes.heads)
    keys.only("head_dim", sizes.hidden // sizes.heads)


def layer_types(keys: Keys, default: Sequence[str]) -> tuple[str, ...]:
    """full_attention or sliding_attention, for each layer.

    Raises:
        ModelError: config.json lists another type, or not as many as there are layers.
    """
    found = keys.per_layer("layer_types", len(default), _FULL, _SLIDING, "attention")
    # "attention" is how early files say full_attention.
    return tuple(_FULL if kind == "attention" else kind for kind in found or default)


def periodic_layer_types(
    keys: Keys, layers: int, *, every: int, first: bool = False
) -> tuple[str, ...]:
    """Full attention in one of `every` layers, unless config.json lists the types.

    Args:
        keys: of config.json.
        layers: of the model.
        every: Layers of a period.
        first: It is the first of them, else the last.

    Raises:
        ModelError: as `layer_types`.
    """
    full = 0 if first else every - 1
    return layer_types(keys, [_FULL if n % every == full else _SLIDING for n in range(layers)])


def windows(types: Sequence[str], window: int | None) -> tuple[int | None, ...]:
    """Window of each layer, of its type.

    Raises:
        ModelError: a layer is of type sliding_attention and the model has no window.
    """
    if window is None and _SLIDING in types:
        raise ModelError(
            f"layer_types has {types.count(_SLIDING)} layers of sliding_attention, but "
            "sliding_window is null or switched off; set it, or make them full_attention"
        )
    return tuple(window if kind == _SLIDING else None for kind in types)


def same_window(keys: Keys, layers: int, window: int | None) -> tuple[int | None, ...]:
    """`window` in every layer.

    Raises:
        ModelError: layer_types says something else.
    """
    default = (_FULL if window is None else _SLIDING,) * layers
    if (types := layer_types(keys, default)) != default:
        raise ModelError(
            f"layer_types has {types.count(_SLIDING)} of {layers} layers with a sliding window, "
            f"but this family has sliding_window = {window} in all; remove layer_types"
        )
    return (window,) * layers
