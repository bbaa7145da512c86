"""What to quantize and how: the object that checkpoints, kernels and result tables agree on."""

from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from quatom.errors import RecipeError

FORMAT_VERSION = 2

WeightFormat = Literal["int2", "int3", "int4", "int5", "int6", "int7", "int8", "e2m1", "float16"]
ActivationFormat = Literal["int3", "int4", "int8", "e4m3", "e2m1", "float16"]
KVFormat = Literal["int4", "int8", "float16"]

_BITS = {"e2m1": 4, "e4m3": 8, "float16": 16} | {f"int{b}": b for b in range(2, 9)}


def _check_types(owner: str, spec: Any) -> None:
    """Every field against its annotation: what comes from JSON may hold anything.

    A misspelt choice must not be taken for another one: `rounding="rtn"` is an error, not GPTQ.
    """
    for name, hint in get_type_hints(type(spec)).items():
        value = getattr(spec, name)
        if get_origin(hint) is Literal:
            if value not in (allowed := get_args(hint)):
                raise RecipeError(
                    f"{owner}.{name} must be one of {', '.join(allowed)}, got {value!r}"
                )
            continue
        expected = (int, float) if hint is float else hint
        if isinstance(value, bool) or not isinstance(value, expected):
            raise RecipeError(f"{owner}.{name} must be of type {hint.__name__}, got {value!r}")


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
class WeightSpec:
    """Symmetric quantization of the weights of every decoder linear."""

    format: WeightFormat = "int4"
    """Number format of a code; float16 leaves the weights in their own dtype."""
    group_size: int = 128
    """Consecutive input channels that share one scale; -1 is the whole row (per channel)."""
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
    rounding: Literal["nearest", "gptq"] = "gptq"
    """Round each weight alone, or push its error onto the columns that are not rounded yet."""
    damping: float = 0.01
    """GPTQ: fraction of the mean diagonal of the second moments that is added to the diagonal."""
    column_order: Literal["stored", "important_first"] = "stored"
    """GPTQ: visit columns as they are stored, a group's scale following the errors pushed onto it;
    or by descending second moment, with the scales of the unchanged weights."""
    descent_sweeps: int = 0
    """Sweeps of coordinate descent over the codes that GPTQ found, scales fixed."""
    target: Literal["own_input", "float_input"] = "own_input"
    """What GPTQ approximates: the float weight's output on the quantized network's inputs, or the
    float network's own output (asymmetric calibration)."""
    target_strength: float = 1.0
    """Fraction of the correction towards a float target that is applied, in (0, 1]."""

    def __post_init__(self) -> None:
        _check_types("weights", self)
        _check_group("weights", self.group_size)
        _check_ratio("weights", "clip_ratio", self.clip_ratio)
        if self.rows_per_scale < 1:
            raise RecipeError(
                f"weights.rows_per_scale must be at least 1, got {self.rows_per_scale}"
            )
        _check_ratio("weights", "target_strength", self.target_strength)
        if self.column_order != "stored" and self.rounding != "gptq":
            raise RecipeError(
                f"weights.column_order {self.column_order!r} is how GPTQ visits columns: it needs "
                "weights.rounding 'gptq'"
            )
        if self.descent_sweeps < 0 or (self.descent_sweeps and self.rounding != "gptq"):
            raise RecipeError(
                f"weights.descent_sweeps {self.descent_sweeps} must be at least 0, and above 0 it "
                "needs weights.rounding 'gptq', whose codes it improves"
            )
        if self.target != "own_input" and self.rounding != "gptq":
            raise RecipeError(
                f"weights.target {self.target!r} is what GPTQ approximates: it needs "
                "weights.rounding 'gptq'"
            )
        if self.scale_format != "float16":
            _check_multiples("weights", self.scale_format, self.format)
        if not 0.0 < self.damping < 1.0:
            raise RecipeError(f"weights.damping must be in (0, 1), got {self.damping}")

    @property
    def bits(self) -> int:
        """Bits per code, scales not counted."""
        return _BITS[self.format]


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationSpec:
    """Dynamic symmetric quantization of the input of every decoder linear, token by token."""

    format: ActivationFormat = "int4"
    """Number format of a code; float16 leaves activations in their own dtype."""
    group_size: int = 128
    """Consecutive channels that share one scale, as the weights do; -1: all normal channels of a
    token share one, whatever the groups of the weights. 8 bits lose little by it where groups are
    rotated."""
    scale_format: Literal["float16", "multiples"] = "float16"
    """float16: every group has a scale of its own. multiples: as for weights, of one scale per
    token."""
    clip_ratio: float = 1.0
    """Fraction of a group's absolute maximum that maps onto the largest code."""
    rotation: Literal["none", "hadamard"] = "none"
    """Rotate every normal group, with its weights, by a Hadamard matrix before quantizing it."""

    def __post_init__(self) -> None:
        _check_types("activations", self)
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
        return _BITS[self.format]


@dataclass(frozen=True, slots=True, kw_only=True)
class KVSpec:
    """Asymmetric quantization of the KV cache, one group per token and KV head."""

    format: KVFormat = "int4"
    """Number format of a code; float16 keeps the cache in the activations' dtype."""
    clip_ratio: float = 1.0
    """Fraction of a group's range that maps onto the code range."""
    keys: Literal["pre_rope", "post_rope"] = "pre_rope"
    """Quantize K before rotary embedding, as the original does, or after it. The CUDA kernels read
    post_rope."""
    rotation: Literal["none", "hadamard"] = "none"
    """Rotate q and k of every head by the same Hadamard matrix after rotary embedding, which
    leaves scores unchanged and spreads K's outlier channels. Needs post_rope."""
    key_offset: Literal["none", "mean", "weighted"] = "none"
    """Subtract from every K, after rotary embedding, its mean over the calibration text: one vector
    per KV head, which adds the same to all scores of a query and so changes no attention. Biased
    keys (Qwen2) otherwise spend the range on what all tokens share. weighted: each key counts by
    how much an error of it changes attention's output. Needs post_rope."""
    key_scaling: Literal["none", "balanced", "weighted"] = "none"
    """Fold factors into k_proj and their inverses into q_proj, one per rotary pair of channels, so
    that no channel's error weighs much more than the others'. balanced: powers of two, all tokens
    alike; weighted: not rounded, tokens weighted as in key_offset."""
    value_rotation: Literal["none", "hadamard"] = "none"
    """Fold a Hadamard rotation of every head into v_proj's rows and o_proj's columns."""

    def __post_init__(self) -> None:
        _check_types("kv_cache", self)
        _check_ratio("kv_cache", "clip_ratio", self.clip_ratio)
        if self.rotation == "hadamard" and self.keys != "post_rope":
            raise RecipeError(
                "kv_cache.rotation 'hadamard' rotates q and k after rotary embedding: it needs "
                "kv_cache.keys 'post_rope'"
            )
        if self.key_offset != "none" and self.keys != "post_rope":
            raise RecipeError(
                f"kv_cache.key_offset {self.key_offset!r} is subtracted after rotary embedding: it "
                "needs kv_cache.keys 'post_rope'"
            )

    @property
    def bits(self) -> int:
        """Bits per code, scales not counted."""
        return _BITS[self.format]

    @property
    def weighs_keys(self) -> bool:
        """Whether keys are measured by what their errors do to attention's output."""
        return "weighted" in (self.key_offset, self.key_scaling)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingSpec:
    """Factors that input channels of linears are divided by and columns of weights multiplied by.

    They are folded into norms and into the rows of the linears before, and cost nothing.
    """

    method: Literal["none", "balanced", "smoothquant", "awq"] = "none"
    """balanced: so that rounding errors of inputs and of weights weigh alike; smoothquant: by
    maxima, where a norm makes the input; awq: by mean magnitudes, with a power found by search."""
    strength: float = 0.5
    """balanced: 1 is the full balance; smoothquant: the migration strength alpha; awq: bound of the
    powers that are tried. In (0, 1]."""

    def __post_init__(self) -> None:
        _check_types("channel_scaling", self)
        _check_ratio("channel_scaling", "strength", self.strength)


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
        _check_types("outliers", self)
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
    """An expert to which fewer tokens came is measured on all tokens, too: the means of both are
    blended, its own weighing with the fraction of this number that came."""

    def __post_init__(self) -> None:
        _check_types("calibration", self)
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

    name: str = "custom"
    """Shown in tables; presets carry their own."""
    weights: WeightSpec = field(default_factory=WeightSpec)
    activations: ActivationSpec = field(default_factory=ActivationSpec)
    kv_cache: KVSpec = field(default_factory=KVSpec)
    outliers: OutlierSpec = field(default_factory=OutlierSpec)
    channel_scaling: ScalingSpec = field(default_factory=ScalingSpec)
    calibration: CalibrationSpec = field(default_factory=CalibrationSpec)
    tensor_parallel: int = 1
    """B: o_proj and down_proj carry a block-diagonal order with outliers of their own in each of B
    equal blocks of their input, so that any tensor-parallel degree dividing B loads by slicing."""
    on_singular: Literal["error", "nearest"] = "error"
    """A layer whose second moments GPTQ cannot invert: stop, or round that layer to nearest."""
    format_version: int = FORMAT_VERSION
    """Version of the checkpoint format. Version 1 had no packed multiples, channel scaling,
    weighted keys or descent."""

    def __post_init__(self) -> None:
        _check_types("recipe", self)
        if self.format_version != FORMAT_VERSION:
            raise RecipeError(f"format_version must be {FORMAT_VERSION}, got {self.format_version}")
        if self.tensor_parallel < 1:
            raise RecipeError(f"tensor_parallel must be at least 1, got {self.tensor_parallel}")
        if self.quantizes_activations and self.weights.format == "float16":
            raise RecipeError(
                f"activations are {self.activations.format} but weights float16: quantize the "
                "weights too, or leave the activations in float16"
            )
        if self.activations.rotation != "none" and not self.quantizes_activations:
            raise RecipeError(
                f"activations.rotation {self.activations.rotation!r} rotates groups as they are "
                "quantized: it needs a quantized activations.format"
            )
        if self.channel_scaling.method != "none" and not self.quantizes_weights:
            raise RecipeError(
                f"channel_scaling.method {self.channel_scaling.method!r} prepares weights for "
                "rounding: it needs a quantized weights.format"
            )
        moved = self.outliers.channels > 0 or self.activations.rotation != "none"
        if self.channel_scaling.method == "awq" and moved:
            raise RecipeError(
                "channel_scaling.method 'awq' searches on the groups of channels as they come: it "
                "needs outliers.channels 0 and activations.rotation 'none'"
            )
        sizes = self.weights.group_size, self.activations.group_size
        if self.quantizes_activations and sizes[1] not in (-1, sizes[0]):
            raise RecipeError(
                f"weights.group_size {sizes[0]} and activations.group_size {sizes[1]} differ: a "
                "GEMM dequantizes both at each group; -1, one scale for all normal channels of a "
                "token, goes with every group size of weights"
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
    def needs_moments(self) -> bool:
        """Whether rounding weights reads second moments of their inputs."""
        return self.quantizes_weights and (
            self.weights.rounding == "gptq"
            or self.weights.clip_search in ("output", "group_output")
        )

    @property
    def needs_calibration(self) -> bool:
        """Whether quantizing reads text: for orders, factors, moments or keys."""
        if not self.quantizes_weights:
            return False
        return (
            self.needs_moments
            or self.outliers.channels > 0
            or self.channel_scaling.method != "none"
            or self.kv_cache.key_offset != "none"
            or self.kv_cache.key_scaling != "none"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, as stored in a checkpoint's config.json."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Read `to_dict` output, of this format version or an older one.

        Raises:
            RecipeError: a key is unknown, a value is not allowed, or the format version is newer
                than this library.
        """
        version = data.get("format_version", 1) if isinstance(data, dict) else 1
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise RecipeError(
                f"recipe has format_version {version}, this Quatom reads up to {FORMAT_VERSION}; "
                "upgrade Quatom"
            )
        if isinstance(data, dict) and type(version) is int and 0 < version < FORMAT_VERSION:
            # Fields that a version added have defaults that mean what was there before.
            data = data | {"format_version": FORMAT_VERSION}
        return _read(cls, data, "recipe")


def _read(cls: type, data: object, owner: str) -> Any:
    """Build dataclass `cls` from nested dicts, refusing unknown keys by their full name."""
    if not isinstance(data, dict):
        raise RecipeError(f"{owner} must be an object with named fields, got {data!r}")
    known = {f.name for f in fields(cls)}
    if unknown := sorted(data.keys() - known):
        raise RecipeError(f"unknown keys {unknown} in {owner}; known keys are {sorted(known)}")
    hints = get_type_hints(cls)
    try:
        return cls(
            **{
                key: _read(hints[key], value, key) if is_dataclass(hints[key]) else value
                for key, value in data.items()
            }
        )
    except TypeError as error:
        raise RecipeError(f"cannot read {owner}: {error}") from error
