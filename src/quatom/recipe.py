"""What to quantize and how: the object that checkpoints, kernels and result tables agree on."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal, Self

from quatom.arguments import Size
from quatom.errors import RecipeError
from quatom.recipe_fields import check_types, read_fields
from quatom.recipe_formats import BITS, ActivationFormat, KVFormat, WeightFormat
from quatom.recipe_idle import check_idle
from quatom.recipe_overrides import Override
from quatom.recipe_tuning import LowRankSpec, OmniQuantSpec, TuningSpec
from quatom.recipe_versions import FORMAT_VERSION, to_current


def _check_group(owner: str, group_size: int) -> None:
    if group_size != -1 and (group_size < 32 or group_size % 32):
        raise RecipeError(
            f"{owner}.group_size must be -1 (whole row) or a multiple of 32, got {group_size}"
        )


def _check_multiples(owner: str, scale_format: str, form: str) -> None:
    if form not in ("int2", "int3", "int4"):
        raise RecipeError(
            f"{owner}.scale_format {scale_format!r} keeps a code times up to 16 within INT8: it "
            f"needs int2, int3 or int4 {owner}, not {form}"
        )


def _check_ratio(owner: str, name: str, value: float) -> None:
    if not 0.0 < value <= 1.0:
        raise RecipeError(f"{owner}.{name} must be in (0, 1], got {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class GPTQSpec:
    """Push the rounding error of a column onto the columns that are not rounded yet."""

    method: Literal["gptq"] = "gptq"
    """GPTQ; it reads second moments of the inputs."""
    damping: float = 0.01
    """Fraction of the mean diagonal of the second moments that is added to the diagonal."""
    column_order: Literal["stored", "important_first"] = "stored"
    """stored: visit columns in stored order; a group's scale follows the errors pushed onto it.
    important_first: by descending second moment, with the scales of the unchanged weights."""
    descent_sweeps: int = 0
    """Sweeps of coordinate descent over the codes that were found, scales fixed."""
    float_target: float = 0.0
    """Which output codes approximate. 0: the float weight's, on the quantized network's inputs. 1:
    the float network's own (asymmetric calibration). Between 0 and 1: a mixture of both."""
    on_singular: Literal["error", "nearest"] = "error"
    """A layer whose second moments cannot be inverted: stop, or round that layer to nearest."""

    def __post_init__(self) -> None:
        check_types("weights.rounder", self)
        if not 0.0 < self.damping < 1.0:
            raise RecipeError(f"weights.rounder.damping must be in (0, 1), got {self.damping}")
        if self.descent_sweeps < 0:
            raise RecipeError(
                f"weights.rounder.descent_sweeps must be at least 0, got {self.descent_sweeps}"
            )
        if not 0.0 <= self.float_target <= 1.0:
            raise RecipeError(
                f"weights.rounder.float_target must be in [0, 1], got {self.float_target}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class NearestSpec:
    """Round each weight alone."""

    method: Literal["nearest"] = "nearest"
    """To the nearest code."""

    def __post_init__(self) -> None:
        check_types("weights.rounder", self)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSpec:
    """Symmetric quantization of the weights of every decoder linear."""

    format: WeightFormat = "int4"
    """Number format of a code; odd4 has the odd integers from -15 to 15 and no zero; float16 leaves
    the weights in their own dtype."""
    group_size: int = 128
    """Consecutive input channels that share one scale; -1 is the whole row (per channel)."""
    groups: Literal["consecutive", "ordered"] = "consecutive"
    """consecutive: channels of a group are neighbours in the model, but for outliers, which order
    all channels. ordered: all channels are ordered, also where there are no outliers. Checkpoints
    of GPTQ with act-order have such groups."""
    rows_per_scale: int = 1
    """Adjacent output rows that share one scale (2 in the original, whose kernel needed it)."""
    clip_ratio: float = 1.0
    """Fraction of a group's absolute maximum that maps onto the largest code."""
    clip_search: Literal["none", "mse", "output", "group_output"] = "none"
    """Search the ratio of each group below 1.0 instead of using the constant: by the squared error
    of the weights (mse), by that error weighted with the second moment of each input channel
    (output), or by the squared error of the group's share of the output (group_output, as AWQ)."""
    scale_format: Literal["float16", "multiples", "packed_multiples"] = "float16"
    """float16: every group has a scale of its own. multiples: the scale of a group is a multiple, 1
    to 16, of one scale per row. A code times its multiple then fits INT8, and a product adds up all
    groups in int32. Both are stored as float16. packed_multiples: the scales of multiples, stored
    as 4-bit multiples and one float16 scale per row. For int2 to int4."""
    rounder: GPTQSpec | NearestSpec = field(default_factory=GPTQSpec)
    """How codes are found once scales are known."""

    def __post_init__(self) -> None:
        check_types("weights", self)
        _check_group("weights", self.group_size)
        _check_ratio("weights", "clip_ratio", self.clip_ratio)
        if self.rows_per_scale < 1:
            raise RecipeError(
                f"weights.rows_per_scale must be at least 1, got {self.rows_per_scale}"
            )
        if self.scale_format != "float16":
            _check_multiples("weights", self.scale_format, self.format)

    @property
    def bits(self) -> int:
        """Bits per code, scales not counted."""
        return BITS[self.format]


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationSpec:
    """Dynamic symmetric quantization of the input of every decoder linear, token by token."""

    format: ActivationFormat = "int4"
    """Number format of a code; float16 leaves activations in their own dtype."""
    group_size: int = 128
    """Consecutive channels that share one scale: as many as in the weights' groups. -1: all normal
    channels of a token share one scale, whatever the groups of the weights; with rotated groups and
    8 bits this loses little."""
    scale_format: Literal["float16", "multiples"] = "float16"
    """float16: every group has a scale of its own. multiples: as for weights, of one scale per
    token."""
    clip_ratio: float = 1.0
    """Fraction of a group's absolute maximum that maps onto the largest code."""
    rotation: Literal["none", "hadamard"] = "none"
    """Rotate every normal group, with its weights, by a Hadamard matrix before quantizing it."""

    def __post_init__(self) -> None:
        check_types("activations", self)
        _check_group("activations", self.group_size)
        if self.scale_format == "multiples":
            _check_multiples("activations", self.scale_format, self.format)
            if self.group_size == -1:
                raise RecipeError(
                    "activations.scale_format 'multiples' relates scales of groups, and "
                    "activations.group_size -1 has one scale: give a group size or 'float16'"
                )
        _check_ratio("activations", "clip_ratio", self.clip_ratio)

    @property
    def bits(self) -> int:
        """Bits per code, scales not counted."""
        return BITS[self.format]


@dataclass(frozen=True, slots=True, kw_only=True)
class PreRopeKeys:
    """Cache K before rotary embedding, as the original does, and embed it whenever it is read."""

    method: Literal["pre_rope"] = "pre_rope"
    """Before rotary embedding."""

    def __post_init__(self) -> None:
        check_types("kv_cache.keys", self)


@dataclass(frozen=True, slots=True, kw_only=True)
class PostRopeKeys:
    """Cache K after rotary embedding. The CUDA kernels read these."""

    method: Literal["post_rope"] = "post_rope"
    """After rotary embedding."""
    rotation: Literal["none", "hadamard"] = "none"
    """Rotate q and k of every head by the same Hadamard matrix, which leaves scores unchanged and
    spreads K's outlier channels."""
    offset: Literal["none", "mean", "weighted"] = "none"
    """Subtract from every K its mean over the calibration text: one vector per KV head, which adds
    the same to all scores of a query and so changes no attention. Biased keys (Qwen2) otherwise
    spend the range on what all tokens share. weighted: each key counts by how much an error of it
    changes attention's output."""

    def __post_init__(self) -> None:
        check_types("kv_cache.keys", self)


@dataclass(frozen=True, slots=True, kw_only=True)
class KVSpec:
    """Asymmetric quantization of the KV cache, one group per token and KV head."""

    format: KVFormat = "int4"
    """Number format of a code; float16 keeps the cache in the activations' dtype."""
    clip_ratio: float = 1.0
    """Fraction of a group's range that maps onto the code range."""
    keys: PreRopeKeys | PostRopeKeys = field(default_factory=PreRopeKeys)
    """Where K is quantized, and how it is prepared there."""
    key_scaling: Literal["none", "balanced", "weighted"] = "none"
    """Fold factors into k_proj and their inverses into q_proj, one per rotary pair of channels, so
    that no channel's error weighs much more than the others'. balanced: powers of two, all tokens
    alike; weighted: not rounded, tokens weighted as in the weighted offset."""
    value_rotation: Literal["none", "hadamard"] = "none"
    """Fold a Hadamard rotation of every head into v_proj's rows and o_proj's columns."""

    def __post_init__(self) -> None:
        check_types("kv_cache", self)
        _check_ratio("kv_cache", "clip_ratio", self.clip_ratio)

    @property
    def bits(self) -> int:
        """Bits per code, scales not counted."""
        return BITS[self.format]

    @property
    def post_rope(self) -> bool:
        """Whether K is cached after rotary embedding."""
        return isinstance(self.keys, PostRopeKeys)

    @property
    def rotates_keys(self) -> bool:
        """Whether q and k of every head are rotated by a Hadamard matrix."""
        return isinstance(self.keys, PostRopeKeys) and self.keys.rotation == "hadamard"

    @property
    def key_offset(self) -> Literal["none", "mean", "weighted"]:
        """Which mean of K is subtracted before it is cached."""
        return self.keys.offset if isinstance(self.keys, PostRopeKeys) else "none"

    @property
    def weighs_keys(self) -> bool:
        """Whether keys are measured by what their errors do to attention's output."""
        return "weighted" in (self.key_offset, self.key_scaling)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingSpec:
    """Factors that input channels of linears are divided by and columns of weights multiplied by.

    They are folded into norms and into the rows of the linears before, and cost nothing.
    """

    method: Literal["balanced", "smoothquant", "awq"]
    """balanced: rounding errors of inputs and of weights count alike; smoothquant: by maxima, only
    for inputs that a norm makes; awq: by mean magnitudes, with a power found by search."""
    strength: float = 0.5
    """balanced: 1 is the full balance; smoothquant: the migration strength alpha; awq: bound of the
    powers that are tried. In (0, 1]."""

    def __post_init__(self) -> None:
        check_types("channel_scaling", self)
        _check_ratio("channel_scaling", "strength", self.strength)


@dataclass(frozen=True, slots=True, kw_only=True)
class SplittingSpec:
    """Channels of large magnitude cut into equal parts, in the places of channels merged away.

    Parts are divided in norms and in the rows of the linears before, and gathered as any order of
    channels is: K stays. How many parts each channel has comes from a search on the calibration
    inputs.
    """

    largest_share: float = 0.2
    """Most parts that are added, as a fraction of the input channels; in (0, 1/3]."""

    def __post_init__(self) -> None:
        check_types("channel_splitting", self)
        if not 0.0 < self.largest_share <= 1 / 3:
            raise RecipeError(
                "channel_splitting.largest_share must be in (0, 1/3], so that every channel merged "
                f"away has one of its own to stand for it; got {self.largest_share}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class IncoherenceSpec:
    """Random orthogonal matrices on both sides of every weight.

    Inputs and outputs of linears are rotated at run time, in floating point.
    """

    seed: int = 0
    """Gives the matrices, with the names of the linears."""

    def __post_init__(self) -> None:
        check_types("incoherence", self)


@dataclass(frozen=True, slots=True, kw_only=True)
class OutlierSpec:
    """Channels that are moved to the end and kept in a wider format."""

    channels: int = 128
    """Outlier channels of a linear's input (of each tensor-parallel block of it); 0: none."""
    max_fraction: float = 0.125
    """Upper bound as a fraction of the hidden size: small models keep the largest power of two
    below it, so that SmolLM2 (hidden 576) has 64 outliers and Llama (4096) has 128."""
    format: Literal["int8", "float16"] = "int8"
    """Format of outlier weights and activations."""
    metric: Literal["second_moment", "abs_mean"] = "second_moment"
    """Score of a channel: mean square of the calibration inputs, or mean magnitude."""

    def __post_init__(self) -> None:
        check_types("outliers", self)
        if self.channels < 0 or self.channels % 32:
            raise RecipeError(
                f"outliers.channels must be 0 or a multiple of 32, got {self.channels}"
            )
        _check_ratio("outliers", "max_fraction", self.max_fraction)


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSpec:
    """The text that statistics are measured on."""

    num_samples: int = 128
    """Number of sequences."""
    sequence_length: int = 2048
    """Tokens in each sequence."""
    seed: int = 0
    """Seed that chooses the sequences. The same seed and text give a bit-identical checkpoint."""
    min_expert_tokens: int = 1024
    """Tokens that an expert needs for statistics of its own. With n tokens, fewer than this number,
    its own count with n / min_expert_tokens, and those of all tokens with the rest."""

    def __post_init__(self) -> None:
        check_types("calibration", self)
        if self.num_samples < 1 or self.sequence_length < 2:
            raise RecipeError(
                f"calibration needs at least 1 sample of 2 tokens, got {self.num_samples} of "
                f"{self.sequence_length}"
            )
        if self.min_expert_tokens < 1:
            raise RecipeError(
                f"calibration.min_expert_tokens must be at least 1, got {self.min_expert_tokens}: "
                "an expert without a token has no statistics of its own"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A complete quantization of a decoder model. See `quatom.presets` for the named ones."""

    name: Annotated[str, Size(1, 200)] = "custom"
    """Shown in tables; presets carry their own."""
    weights: WeightSpec = field(default_factory=WeightSpec)
    activations: ActivationSpec = field(default_factory=ActivationSpec)
    kv_cache: KVSpec = field(default_factory=KVSpec)
    outliers: OutlierSpec = field(default_factory=OutlierSpec)
    channel_scaling: ScalingSpec | None = None
    """Divide input channels by factors; None: leave them as they are."""
    channel_splitting: SplittingSpec | None = None
    """Cut channels of large magnitude into parts and merge others; None: do not."""
    incoherence: IncoherenceSpec | None = None
    """Rotate every weight on both sides; None: do not."""
    calibration: CalibrationSpec = field(default_factory=CalibrationSpec)
    tuning: TuningSpec | OmniQuantSpec | LowRankSpec | None = None
    """What is learned by gradients; None: nothing."""
    overrides: tuple[Override, ...] = ()
    """Other formats for some layers and sites. Each must make a recipe that is allowed."""
    tensor_parallel: int = 1
    """B: the inputs of o_proj and down_proj are B equal blocks, each with a channel order and
    outliers of its own. A tensor-parallel degree that divides B can then load slices."""
    format_version: int = FORMAT_VERSION
    """Version of the checkpoint format. Older ones are read: see `quatom.recipe_versions`."""

    def __post_init__(self) -> None:
        check_types("recipe", self)
        if self.format_version != FORMAT_VERSION:
            raise RecipeError(f"format_version must be {FORMAT_VERSION}, got {self.format_version}")
        if self.tensor_parallel < 1:
            raise RecipeError(f"tensor_parallel must be at least 1, got {self.tensor_parallel}")
        if self.quantizes_activations and self.weights.format == "float16":
            raise RecipeError(
                f"activations are {self.activations.format} but weights float16: quantize the "
                "weights too, or leave the activations in float16"
            )
        scaling = None if self.channel_scaling is None else self.channel_scaling.method
        if scaling is not None and not self.quantizes_weights:
            raise RecipeError(
                f"channel_scaling.method {scaling!r} prepares weights for rounding: it needs a "
                "quantized weights.format"
            )
        moved = self.orders_channels or self.activations.rotation != "none"
        if scaling == "awq" and moved:
            raise RecipeError(
                "channel_scaling.method 'awq' searches on the groups of channels as they come: it "
                "needs outliers.channels 0, weights.groups 'consecutive' and activations.rotation "
                "'none'"
            )
        self._check_incoherence()
        self._check_splitting()
        check_idle(self)
        sizes = self.weights.group_size, self.activations.group_size
        if self.quantizes_activations and sizes[1] not in (-1, sizes[0]):
            raise RecipeError(
                f"weights.group_size {sizes[0]} and activations.group_size {sizes[1]} differ: a "
                "GEMM dequantizes both at each group; -1, one scale for all normal channels of a "
                "token, goes with every group size of weights"
            )
        self._check_overrides()

    def _check_overrides(self) -> None:
        for number, override in enumerate(self.overrides):
            form = None if override.weights is None else override.weights.format
            if form is not None and (form == "float16") == self.quantizes_weights:
                raise RecipeError(
                    f"overrides[{number}]: weights.format {form} in a recipe of "
                    f"{self.weights.format} weights: all linears hold codes, or none does"
                )
            try:
                self._changed([override])
            except RecipeError as error:
                raise RecipeError(f"overrides[{number}]: {error}") from error

    def _changed(self, overrides: Iterable[Override]) -> "Recipe":
        parts: dict[str, dict[str, Any]] = {}
        for override in overrides:
            for name, values in override.changes().items():
                parts[name] = parts.get(name, {}) | values
        made = {name: replace(getattr(self, name), **values) for name, values in parts.items()}
        return replace(self, overrides=(), **made)

    def at(self, layer: int, site: str | None = None) -> "Recipe":
        """What holds for a site of a layer, as a recipe without overrides.

        Without a site it is what holds for the whole layer: its KV cache.

        Raises:
            RecipeError: overrides that are allowed alone do not go together.
        """
        if not self.overrides:
            return self
        try:
            return self._changed(o for o in self.overrides if o.covers(layer, site))
        except RecipeError as error:
            raise RecipeError(f"overrides of layer {layer}, {site}: {error}") from error

    @property
    def variants(self) -> "tuple[Recipe, ...]":
        """The recipe without its overrides, and under each of them alone."""
        return self._changed([]), *(self._changed([override]) for override in self.overrides)

    @property
    def kv_formats(self) -> tuple[str, ...]:
        """Formats of the KV caches of layers, that of the recipe first."""
        return tuple(dict.fromkeys(own.kv_cache.format for own in self.variants))

    def _check_incoherence(self) -> None:
        if self.incoherence is None:
            return
        for needed, fits in (
            ("a quantized weights.format", self.quantizes_weights),
            ("activations.format 'float16'", not self.quantizes_activations),
            ("outliers.channels 0", self.outliers.channels == 0),
            ("weights.groups 'consecutive'", self.weights.groups == "consecutive"),
            ("tensor_parallel 1", self.tensor_parallel == 1),
            ("weights.rounder.float_target 0", self.float_target == 0),
        ):
            if not fits:
                raise RecipeError(
                    "incoherence mixes all channels of weights whose inputs stay in floating "
                    f"point: it needs {needed}"
                )

    def _check_splitting(self) -> None:
        if self.channel_splitting is None:
            return
        for needed, fits in (
            ("a quantized activations.format", self.quantizes_activations),
            ("activations.rotation 'none'", self.activations.rotation == "none"),
            ("outliers.channels 0", self.outliers.channels == 0),
            ("weights.groups 'consecutive'", self.weights.groups == "consecutive"),
            ("channel_scaling null", self.channel_scaling is None),
            ("tensor_parallel 1", self.tensor_parallel == 1),
        ):
            if not fits:
                raise RecipeError(
                    "channel_splitting divides and orders channels of inputs by what rounding "
                    f"those inputs costs: it needs {needed}"
                )

    @property
    def quantizes_weights(self) -> bool:
        """Whether decoder linears hold codes."""
        return self.weights.format != "float16"

    @property
    def quantizes_activations(self) -> bool:
        """Whether the inputs of decoder linears are quantized."""
        return self.activations.format != "float16"

    @property
    def float_target(self) -> float:
        """Fraction of the correction towards the float network's outputs, which 0 does not need."""
        rounder = self.weights.rounder
        return rounder.float_target if isinstance(rounder, GPTQSpec) else 0.0

    @property
    def orders_channels(self) -> bool:
        """Whether channels of any input are in another order than in the model."""
        more = [o.outliers.channels or 0 for o in self.overrides if o.outliers is not None]
        ordered = max(self.outliers.channels, *more, 0) > 0 or self.weights.groups == "ordered"
        return self.quantizes_weights and (ordered or self.channel_splitting is not None)

    @property
    def needs_moments(self) -> bool:
        """Whether rounding weights reads second moments of their inputs."""
        return self.quantizes_weights and (
            isinstance(self.weights.rounder, GPTQSpec)
            or self.weights.clip_search in ("output", "group_output")
        )

    @property
    def needs_calibration(self) -> bool:
        """Whether quantizing reads text: for orders, factors, moments or keys."""
        if not self.quantizes_weights:
            return False
        return (
            self.needs_moments
            or self.orders_channels
            or self.tuning is not None
            or self.channel_scaling is not None
            or self.kv_cache.key_offset != "none"
            or self.kv_cache.key_scaling != "none"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, as stored in a checkpoint's config.json."""
        return asdict(self) | {"overrides": [override.to_dict() for override in self.overrides]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Read `to_dict` output, of this format version or an older one.

        Raises:
            RecipeError: a key is unknown, a value is not allowed, or the format version is newer
                than this library.
        """
        return read_fields(cls, to_current(data) if isinstance(data, dict) else data)
