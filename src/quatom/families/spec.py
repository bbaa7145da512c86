"""What a decoder computes, layer by layer: the data that every family's config.json becomes.

Nothing outside this package asks which family a model is of. A family whose mathematics these
classes cannot say is not supported; a new field here is a new ability of the one decoder in
`quatom.modeling`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import isfinite
from typing import Literal, Self, get_args

from quatom.errors import ModelError

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "clamped_swiglu", "relu2"]
"""Of a feed-forward layer. gelu is exact (erf), gelu_tanh its tanh approximation; clamped_swiglu is
gpt-oss's, (clamp(up, -7, 7) + 1) * g * sigmoid(1.702 g) with g = min(gate, 7); relu2 is relu**2."""
SiteName = Literal["qkv", "o", "gate_up", "down", "experts_gate_up", "experts_down"]
"""A place in a layer where one activation is made and read by one or several linears. The last two
are those of routed experts: their weights have a leading dimension, one matrix per expert."""
SITES: tuple[SiteName, ...] = get_args(SiteName)
"""All sites that a layer may have, in the order of the network."""
RouterTensor = Literal["weight", "bias", "correction", "shared_gate"]
"""Float tensors beside routed experts: the router's weight (E, hidden), its bias (E,), what is
added to scores for the choice alone (E,), the weight of the shared expert's gate (1, hidden)."""

NormName = Literal["attention", "attention_output", "feed_forward", "feed_forward_output"]
"""A norm of a layer: before attention, after it, before the feed-forward layer, after it."""
NORMS: tuple[NormName, ...] = get_args(NormName)
"""All places of a norm in a layer, in the order of the network."""
HeadNormAxis = Literal["head", "each", "all"]
"""What a norm of q, or of k, normalizes together. head: the channels of each head, one weight
(head_dim,) for all heads; each: the same, with a weight of every head's own (heads, head_dim);
all: the channels of all heads, a weight (heads * head_dim,)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the pre-training length."""

    kind: Literal["linear", "dynamic", "yarn", "llama3", "longrope"]
    """linear divides every frequency by `factor`; dynamic leaves them as they are up to the
    model's own length; llama3 and yarn divide the low ones, with a ramp; longrope divides each by
    a factor of its own."""
    factor: float = 1.0
    original_max_position: int | None = None
    """All but linear: tokens of a sequence in pre-training."""
    attention_factor: float = 1.0
    """yarn and longrope: multiplies cos and sin, so scores by its square."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_max_position / low_freq_factor are divided by factor."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_max_position / high_freq_factor stay as they are."""
    beta_fast: float = 32.0
    """yarn: frequencies with more turns in the pre-training length stay as they are."""
    beta_slow: float = 1.0
    """yarn: frequencies with fewer turns in the pre-training length are divided by factor."""
    truncate: bool = True
    """yarn: the ends of the ramp are whole channel numbers."""
    short_factors: tuple[float, ...] = ()
    """longrope: divisor of each frequency, for lengths up to original_max_position."""
    long_factors: tuple[float, ...] = ()
    """longrope: divisor of each frequency, for longer lengths."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary position embedding of the first `dim` channels of every head."""

    theta: float
    """Base of the frequencies theta ** (-2 j / dim)."""
    dim: int
    """Channels of a head that turn; the rest pass unchanged."""
    interleaved: bool = False
    """False: channels j and j + dim / 2 turn together; True: channels 2 j and 2 j + 1."""
    scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        _positive("rope_theta", self.theta)
        if self.dim < 2 or self.dim % 2:
            raise ModelError(
                f"rotary embedding of {self.dim} channels per head: it pairs channels, so their "
                "number must be even and at least 2"
            )
        scaling = self.scaling
        if scaling is not None and scaling.kind == "longrope":
            sizes = len(scaling.short_factors), len(scaling.long_factors)
            if sizes != (self.dim // 2, self.dim // 2):
                raise ModelError(
                    f"longrope needs {self.dim // 2} short and long factors, one per rotary "
                    f"frequency; config.json has {sizes[0]} and {sizes[1]}"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """Normalization over the last axis."""

    kind: Literal["rms", "layer"] = "rms"
    """rms: x / sqrt(mean(x**2) + eps) * w; layer: the same after the mean is subtracted."""
    eps: float
    weight_offset: float = 0.0
    """Added to the stored weight: 1.0 where the file holds w - 1 (Gemma)."""
    bias: bool = False
    """layer: a bias is added at the end."""
    implicit: bool = False
    """Files of the model hold no weight: all of it is 1."""

    def __post_init__(self) -> None:
        _positive("eps of a norm", self.eps)


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryGrowth:
    """Queries that grow with their position, beyond the pre-training length.

    A turned query of position p is multiplied by 1 + beta * ln(1 + floor(p / length)), its keys
    are not.
    """

    beta: float
    length: int
    """Positions below it have the factor 1."""

    def __post_init__(self) -> None:
        _positive("growth of queries with their position", self.beta)
        _positive_integers(self, "length")


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Causal attention of one layer."""

    num_heads: int
    num_kv_heads: int
    """Heads of K and V; each serves num_heads / num_kv_heads query heads."""
    head_dim: int
    scale: float
    """Factor of q k^T, usually head_dim ** -0.5."""
    rope: Rope | None = None
    """None: no rotary embedding in this layer."""
    window: int | None = None
    """Tokens that a query sees, itself included; None: all before it."""
    query_growth: QueryGrowth | None = None
    logit_softcap: float | None = None
    """c in c * tanh(score / c); None: scores as they are."""
    qk_norm: Norm | None = None
    """Norm of q and k before rotary embedding."""
    sinks: bool = False
    """A learned logit of each query head takes part in the softmax's sum and has no value."""
    rows_by_group: bool = False
    """Files hold the rows of q, k and v by KV head: those of its query heads, its k, its v."""
    qk_norm_axis: HeadNormAxis = "head"

    def __post_init__(self) -> None:
        _positive_integers(self, "num_heads", "num_kv_heads", "head_dim")
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"num_attention_heads {self.num_heads} is not a multiple of num_key_value_heads "
                f"{self.num_kv_heads}: query heads cannot be shared out equally"
            )
        if self.head_dim % 2:
            raise ModelError(f"head_dim {self.head_dim} is odd; the KV cache pairs channels")
        if self.rope is not None and self.rope.dim > self.head_dim:
            raise ModelError(
                f"rotary embedding of {self.rope.dim} channels does not fit head_dim "
                f"{self.head_dim}"
            )
        if self.window is not None and self.window < 1:
            raise ModelError(f"a sliding window of {self.window} tokens must be at least 1")
        if self.logit_softcap is not None:
            _positive("attention's soft-cap", self.logit_softcap)
        _positive("attention's scale", self.scale)

    @property
    def q_size(self) -> int:
        """Rows of q_proj."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Rows of k_proj, and of v_proj."""
        return self.num_kv_heads * self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedForward:
    """activation(gate) * up, or activation(up) where it is not gated; then down.

    clamped_swiglu clamps gate and up, and adds 1 to up.
    """

    size: int
    """Input channels of the down projection."""
    activation: Activation = "silu"
    gated: bool = True

    def __post_init__(self) -> None:
        _positive_integers(self, "size")
        if self.activation == "clamped_swiglu" and not self.gated:
            raise ModelError("clamped_swiglu needs a gate")

    @property
    def is_swiglu(self) -> bool:
        """Whether it is silu(gate) * up."""
        return self.gated and self.activation == "silu"

    @property
    def linear_in_up(self) -> bool:
        """Whether a factor of up's output is one of the input of down."""
        return self.gated and self.activation != "clamped_swiglu"

    @property
    def made_rows(self) -> int:
        """Rows of gate and up together, or of up alone."""
        return self.size * (2 if self.gated else 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    """Which experts a token goes to, and with which weights, from its scores for all experts."""

    scores: Literal["softmax", "sigmoid", "sparsemixer"] = "softmax"
    """Of the products of the token and the router's weight. softmax: over all experts; sigmoid: of
    each. The largest are chosen, after a correction where there is one. sparsemixer: the two
    largest products, each with its softmax over the products that are near enough to it and not
    chosen before."""
    normalized: bool = False
    """softmax and sigmoid: weights of a token's experts are divided by their sum."""
    least_sum: float = 0.0
    """softmax with a correction: what that sum counts at least."""
    scale: float = 1.0
    """Factor of all weights."""
    groups: int = 1
    """sigmoid: experts are cut into so many equal groups..."""
    top_groups: int = 1
    """...of which those with the largest sums of their two largest scores may be chosen from."""
    jitter: float = 0.0
    """sparsemixer: how far below the largest product another may lie, as half a fraction of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """Feed-forward layers of which each token runs through `top_k`."""

    count: int
    """E."""
    top_k: int
    feed_forward: FeedForward
    """Of each expert."""
    router: Router
    tensors: Mapping[RouterTensor, tuple[str, ...]]
    """Names within the layer: this library's, which is transformers', then other ones in files."""

    def __post_init__(self) -> None:
        _positive_integers(self, "count", "top_k")
        router = self.router
        if self.top_k > self.count:
            raise ModelError(f"{self.top_k} experts per token of {self.count} cannot be chosen")
        if router.scores == "sparsemixer" and self.top_k != 2:
            raise ModelError(f"sparsemixer chooses 2 experts per token, not {self.top_k}")
        if self.count % router.groups or not 1 <= router.top_groups <= router.groups:
            raise ModelError(
                f"{self.count} experts cannot be cut into {router.groups} equal groups of which "
                f"{router.top_groups} are chosen"
            )
        size = self.count // router.groups
        if router.groups > 1 and (size < 2 or self.top_k > router.top_groups * size):
            raise ModelError(
                f"{self.top_k} experts per token from {router.top_groups} groups of {size}: "
                "groups must hold 2 experts and all that are chosen"
            )

    @property
    def corrects_softmax(self) -> bool:
        """Whether experts are chosen by corrected softmax scores, which no kernel does."""
        return self.router.scores == "softmax" and "correction" in self.tensors

    def shape(self, tensor: RouterTensor, hidden_size: int) -> tuple[int, ...]:
        """Shape of a float tensor beside the experts."""
        if tensor == "shared_gate":
            return (1, hidden_size)
        return (self.count, hidden_size) if tensor == "weight" else (self.count,)


@dataclass(frozen=True, slots=True)
class Spelling:
    """How files hold a weight, or a bias, under other names."""

    names: tuple[str, ...]
    """Tensors whose rows are joined; {} stands for the number of an expert."""
    transposed: bool = False
    """One tensor (input channels, rows), or of all experts (E, input channels, rows)."""
    interleaved: bool = False
    """One tensor of all experts, in which rows of gate and of up take turns."""
    row: bool = False
    """A vector that may be stored as a matrix of one row."""

    @property
    def whole(self) -> bool:
        """Whether it is one tensor, of all experts where there are any."""
        return len(self.names) == 1 and "{}" not in self.names[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """A weight (rows, input channels) as the model's files name it."""

    name: str
    """Within the layer: "self_attn.q_proj"."""
    rows: int
    bias: bool = False
    experts: int | None = None
    """E: the weight is (E, rows, input channels), one matrix per expert."""
    spellings: tuple[Spelling, ...] = ()
    """Other ways in which files hold the weight."""
    bias_spellings: tuple[Spelling, ...] = ()
    """Other ways in which files hold the bias."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One decoder layer.

    h = hidden + m * norm[attention_output](attend(norm[attention](hidden)))
    hidden = h + m * norm[feed_forward_output](feed(norm[feed_forward](h)))

    with m = residual_multiplier; a norm that is absent is the identity. A parallel layer has
    norm[feed_forward](hidden) there, or norm[attention](hidden) without a norm feed_forward: both
    parts read what enters the layer. Where there are experts,
    feed(x) is the sum of what a token's experts give, each times its weight, and of `feed_forward`
    (the shared expert, times sigmoid(gate x) where there is a gate), if there is one.
    """

    attention: Attention
    feed_forward: FeedForward | None
    """None: routed experts alone."""
    linears: Mapping[SiteName, tuple[Linear, ...]]
    """The linears of every site, in the order in which their rows are joined: q, k, v; o; gate, up
    (or up alone); down. A file may hold several of them as one linear."""
    norms: Mapping[NormName, Norm]
    norm_names: Mapping[NormName, str]
    """Prefix of each norm's tensors within the layer: "input_layernorm"."""
    qk_norm_names: tuple[str, str] = ("self_attn.q_norm", "self_attn.k_norm")
    """Prefixes of the norms of q and k within the layer, where there are any."""
    qk_norm_parts: tuple[str, str] | None = None
    """The same prefixes where files hold the weight of every head by itself; {} is its number."""
    sinks_name: str = "self_attn.sinks"
    """Tensor (num_heads,) of attention's sinks within the layer, where there are any."""
    residual_multiplier: float = 1.0
    parallel: bool = False
    """The feed-forward layer reads what attention reads, not what attention gives."""
    experts: Experts | None = None

    def __post_init__(self) -> None:
        if self.norms.keys() != self.norm_names.keys():
            raise ModelError("every norm of a layer needs a name, and every name a norm")
        wanted: dict[SiteName, int] = {"qkv": self.attention.q_size + 2 * self.attention.kv_size}
        if self.feed_forward is not None:
            wanted["gate_up"] = self.feed_forward.made_rows
        if self.experts is not None:
            wanted["experts_gate_up"] = self.experts.feed_forward.made_rows
        if self.feed_forward is None and self.experts is None:
            raise ModelError("a layer has neither a feed-forward layer nor experts")
        if self.parallel and self.experts is not None:
            raise ModelError("experts beside attention, in one layer, are not supported")
        for site, linears in self.linears.items():
            if len({linear.bias for linear in linears}) > 1:
                raise ModelError(f"some linears of {site} have a bias and some have none")
        for site, rows in wanted.items():
            found = sum(linear.rows for linear in self.linears[site])
            if found != rows:
                raise ModelError(f"the linears of {site} have {found} rows, expected {rows}")

    @property
    def sites(self) -> tuple[SiteName, ...]:
        """Sites of this layer, in the order of the network."""
        return tuple(site for site in SITES if site in self.linears)

    @property
    def shares_norm(self) -> bool:
        """Whether attention and the feed-forward layer read the output of one norm."""
        return self.parallel and "feed_forward" not in self.norms


@dataclass(frozen=True, slots=True, kw_only=True)
class Positions:
    """A learned embedding that is added to each token's by its position."""

    name: str
    """Of the tensor (rows, hidden_size)."""
    rows: int
    offset: int = 0
    """Row of position 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder: embedding, layers, final norm, head. All sizes and constants, checked."""

    family: str
    """Name in `quatom.families.registry`, for messages and tables alone."""
    vocab_size: int
    hidden_size: int
    layers: tuple[Layer, ...]
    final_norm: Norm
    max_position: int
    """Longest sequence, in tokens."""
    tie_word_embeddings: bool = False
    """The output projection is the embedding matrix; no head is stored."""
    embedding_multiplier: float = 1.0
    """Factor of the token embedding, rounded to the dtype of the activations as it is applied."""
    positions: Positions | None = None
    logits_divisor: float = 1.0
    logit_softcap: float | None = None
    """c in c * tanh(logit / c), after the division; None: logits as they are."""
    layer_prefix: str = "model.layers."
    """Tensors of layer i begin with it, i and a dot."""
    embedding_name: str = "model.embed_tokens.weight"
    final_norm_name: str = "model.norm"
    """Prefix of the tensors of the final norm."""
    head_name: str = "lm_head.weight"
    head_bias: bool = False
    """The output projection adds a bias."""
    unused_layers: int = 0
    """Layers after the decoder's in files that it does not run."""
    unused_parts: tuple[str, ...] = ()
    """What names of other tensors in files begin with that it does not run."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    """Tokens that end a generation; may be empty."""

    def __post_init__(self) -> None:
        _positive_integers(self, "vocab_size", "hidden_size", "max_position")
        if not self.layers:
            raise ModelError("num_hidden_layers must be at least 1, got 0")
        if self.positions is not None and self.max_position > (
            rows := self.positions.rows - self.positions.offset
        ):
            raise ModelError(
                f"{self.positions.name} has rows for {rows} positions, the model asks for "
                f"{self.max_position}"
            )

    @property
    def unused_prefixes(self) -> tuple[str, ...]:
        """What names of tensors begin with that files hold and the decoder does not run."""
        last = self.num_layers + self.unused_layers
        layers = (f"{self.layer_prefix}{layer}." for layer in range(self.num_layers, last))
        return (*layers, *self.unused_parts)

    @property
    def head_bias_name(self) -> str:
        """Tensor (vocab_size,), where `head_bias`."""
        return self.head_name.removesuffix("weight") + "bias"

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.layers)

    def with_layers(self, count: int) -> Self:
        """The same model with its first `count` layers alone."""
        return replace(self, layers=self.layers[:count])

    def ropes(self) -> Iterator[Rope]:
        """Every rotary embedding that some layer uses, once."""
        yield from dict.fromkeys(
            layer.attention.rope for layer in self.layers if layer.attention.rope is not None
        )

    def input_channels(self, layer: Layer, site: SiteName) -> int:
        """Input channels of the linears of a site."""
        if site == "o":
            return layer.attention.q_size
        if site == "down":
            assert layer.feed_forward is not None
            return layer.feed_forward.size
        if site == "experts_down":
            assert layer.experts is not None
            return layer.experts.feed_forward.size
        return self.hidden_size


def _positive(name: str, value: float) -> None:
    if not (isfinite(value) and value > 0.0):
        raise ModelError(f"{name} must be positive, got {value}")


def _positive_integers(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelError(f"{name} must be a positive integer, got {value!r}")
