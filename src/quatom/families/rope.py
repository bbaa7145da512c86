"""Rotary embedding from config.json, as transformers 4 and 5 write it.

transformers 4 has `rope_theta` and `rope_scaling`, transformers 5 has `rope_parameters`. All are
read as spellings of the same entries: a file may hold both where they agree.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import log, sqrt

from quatom.errors import ModelError
from quatom.families.keys import Keys
from quatom.families.sizes import Sizes
from quatom.families.spec import Rope, RopeScaling

_PARTIAL = ("partial_rotary_factor", "rotary_pct", "rope_pct")
_ORIGINAL = "original_max_position_embeddings"
_RENAMED = {"su": "longrope"}


@dataclass(frozen=True, slots=True)
class Rotary:
    """Rotary embedding of every layer, and how long a sequence it allows."""

    ropes: tuple[Rope | None, ...]
    max_position: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entries:
    """One set of rotary parameters: where config.json may hold it, and what it may be."""

    keys: Keys
    sections: tuple[str, ...]
    """Dotted names of the objects that may hold an entry."""
    outside: Mapping[str, str]
    """Entry -> the name under which config.json may hold it at its top."""
    max_position: int
    renamed: Mapping[str, str] = field(default_factory=lambda: _RENAMED)
    own_original: int | None = None
    """Default of original_max_position_embeddings in families that have that key at the top."""

    def names(self, *entries: str) -> tuple[str, ...]:
        inside = tuple(f"{section}.{entry}" for section in self.sections for entry in entries)
        return inside + tuple(self.outside[entry] for entry in entries if entry in self.outside)

    def original(self) -> int:
        """Tokens of a sequence in pre-training."""
        *inside, top = self.names(_ORIGINAL)
        if self.own_original is None:
            return self.keys.integer(*inside, top, default=self.max_position, least=2)
        # transformers lets the family's own key win, even where it is absent.
        own = self.keys.integer(top, default=self.own_original, least=2)
        for name in inside:
            self.keys.only(name, own)
        return own

    def factor(self, original: int) -> float:
        """The factor, or what the two lengths say."""
        return self.keys.positive(*self.names("factor"), default=self.max_position / original)


def one_rope(
    keys: Keys,
    sizes: Sizes,
    *,
    theta: float = 10_000.0,
    partial: float | None = None,
    interleaved: bool = False,
    theta_name: str = "rope_theta",
    renamed: Mapping[str, str] = _RENAMED,
    own_original: int | None = None,
    scaling: RopeScaling | None = None,
) -> Rotary:
    """The rotary embedding that all layers share.

    Args:
        keys: of config.json.
        sizes: of the same model.
        theta: Default of rope_theta.
        partial: Default of partial_rotary_factor; None: this family turns all channels.
        interleaved: Channels 2 j and 2 j + 1 turn together.
        theta_name: What this family's files call rope_theta at their top.
        renamed: Kind in config.json -> the kind that it means.
        own_original: Default of original_max_position_embeddings in families that have that key
            beside max_position_embeddings; None: the default is `max_position`.
        scaling: Default of a config.json with neither rope_parameters nor rope_scaling.

    Raises:
        ModelError: a kind or a value is not supported, or two spellings disagree.
    """
    nested = keys.under("rope_parameters.full_attention") + keys.under(
        "rope_parameters.sliding_attention"
    )
    if nested:
        raise ModelError(
            f"config key {keys.show(nested[0])}: this family has one set of rotary parameters "
            "for all layers; write it into rope_parameters itself"
        )
    outside = {"rope_theta": theta_name, _ORIGINAL: _ORIGINAL}
    if partial is not None:
        outside |= {name: name for name in _PARTIAL}
    entries = _Entries(
        keys=keys,
        sections=("rope_parameters", "rope_scaling"),
        outside=outside,
        max_position=sizes.max_position,
        renamed=renamed,
        own_original=own_original,
    )
    said = any(keys.under(f"{section}.") for section in entries.sections)
    rope = _rope(entries, sizes.head_dim, theta, partial, interleaved)
    if not said:
        rope = replace(rope, scaling=scaling)
    return Rotary((rope,) * sizes.layers, _longest(rope, sizes.max_position))


def ropes_by_layer_type(
    keys: Keys,
    sizes: Sizes,
    layer_types: Sequence[str],
    *,
    theta: Mapping[str, float],
    theta_names: Mapping[str, str],
) -> Rotary:
    """A rotary embedding per layer type; max_position counts their scaling already.

    `rope_scaling` of transformers 4 is that of full attention.

    Args:
        keys: of config.json.
        sizes: of the same model.
        layer_types: Type of each layer.
        theta: Type -> default of rope_theta.
        theta_names: Type -> name of rope_theta at the top of config.json, if it has one.

    Raises:
        ModelError: as for `one_rope`.
    """
    ropes = {}
    for kind in theta:
        section = (f"rope_parameters.{kind}",)
        full = kind == "full_attention"
        name = theta_names.get(kind)
        entries = _Entries(
            keys=keys,
            sections=(*section, "rope_scaling") if full else section,
            outside={"rope_theta": name} if name else {},
            max_position=sizes.max_position,
        )
        for spelling in entries.names("truncate"):
            # transformers truncates here whatever the file says.
            keys.only(spelling, True)
        ropes[kind] = _rope(entries, sizes.head_dim, theta[kind], None, False)
    return Rotary(tuple(ropes[kind] for kind in layer_types), sizes.max_position)


def _rope(
    entries: _Entries, head_dim: int, theta: float, partial: float | None, interleaved: bool
) -> Rope:
    keys = entries.keys
    fraction = 1.0
    if partial is None:
        for name in entries.names("partial_rotary_factor"):
            keys.only(name, 1.0)
    else:
        fraction = keys.positive(*entries.names(*_PARTIAL), default=partial)
    return Rope(
        theta=keys.positive(*entries.names("rope_theta"), default=theta),
        dim=int(head_dim * fraction),
        interleaved=interleaved,
        scaling=_scaling(entries),
    )


def _scaling(entries: _Entries) -> RopeScaling | None:
    keys = entries.keys
    keys.ignore(*entries.names(_ORIGINAL))
    kind = keys.text(*entries.names("rope_type", "type"), default="default")
    kind = entries.renamed.get(kind, kind)
    if kind == "default":
        return None
    if kind not in _READERS:
        name = next(n for n in entries.names("rope_type", "type") if keys.value(n) is not None)
        raise ModelError(
            f"config key {keys.show(name)} is not supported; supported: default, "
            f"{', '.join(_READERS)}"
        )
    return _READERS[kind](entries)


def _linear(entries: _Entries) -> RopeScaling:
    return RopeScaling(kind="linear", factor=entries.keys.positive(*entries.names("factor")))


def _dynamic(entries: _Entries) -> RopeScaling:
    return RopeScaling(
        kind="dynamic",
        factor=entries.keys.positive(*entries.names("factor")),
        original_max_position=entries.max_position,
    )


def _llama3(entries: _Entries) -> RopeScaling:
    positive, names = entries.keys.positive, entries.names
    low, high = positive(*names("low_freq_factor")), positive(*names("high_freq_factor"))
    if high <= low:
        raise ModelError(
            f"rope_type llama3: high_freq_factor {high} must be above low_freq_factor {low}"
        )
    return RopeScaling(
        kind="llama3",
        factor=positive(*names("factor")),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position=entries.original(),
    )


def _yarn(entries: _Entries) -> RopeScaling:
    keys, names = entries.keys, entries.names
    original = entries.original()
    factor = entries.factor(original)
    # How Llama 2 and Mistral were extended: of the training, and a constant of the first code.
    keys.ignore(*names("finetuned"))
    for name in names("extrapolation_factor"):
        keys.only(name, 1.0)
    # 0 means the default, as in transformers.
    numerator = keys.number(*names("mscale"), default=0.0)
    denominator = keys.number(*names("mscale_all_dim"), default=0.0)
    both = numerator and denominator
    implied = _mscale(factor, numerator) / _mscale(factor, denominator) if both else _mscale(factor)
    for name in names("attn_factor"):
        if (more := keys.number(name, default=1.0)) != 1.0:
            raise ModelError(
                f"config key {keys.show(name)} is read by some engines and passed over by "
                f"transformers; write attention_factor in its place: {implied * more:.6g} with it, "
                f"{implied:.6g} without"
            )
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_max_position=original,
        attention_factor=keys.positive(*names("attention_factor"), default=implied),
        beta_fast=keys.number(*names("beta_fast"), default=0.0) or 32.0,
        beta_slow=keys.number(*names("beta_slow"), default=0.0) or 1.0,
        truncate=keys.flag(*names("truncate"), default=True),
    )


def _longrope(entries: _Entries) -> RopeScaling:
    keys, names = entries.keys, entries.names
    original = entries.original()
    factor = entries.factor(original)
    implied = 1.0 if factor <= 1.0 else sqrt(1 + log(factor) / log(original))
    return RopeScaling(
        kind="longrope",
        factor=factor,
        original_max_position=original,
        attention_factor=keys.positive(*names("attention_factor"), default=implied),
        short_factors=keys.numbers(*names("short_factor")),
        long_factors=keys.numbers(*names("long_factor")),
    )


_READERS = {
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}


def _mscale(factor: float, weight: float = 1.0) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * weight * log(factor) + 1.0


def _longest(rope: Rope, max_position: int) -> int:
    """Tokens of the longest sequence.

    max_position_embeddings is the length before linear scaling, and before or after that of yarn;
    llama3 and longrope count theirs in it. Dynamic frequencies depend on the length of each
    sequence: beyond the model's own length, keys in the cache would have been turned by others.
    """
    scaling = rope.scaling
    if scaling is not None and scaling.kind == "linear":
        return int(max_position * scaling.factor)
    if scaling is not None and scaling.kind == "yarn" and scaling.original_max_position:
        return max(max_position, int(scaling.original_max_position * scaling.factor))
    return max_position
