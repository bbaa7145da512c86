"""gpt-oss: experts with biases, sinks, a window in every second layer; hidden size 2880.

2880 is no multiple of 128. Nothing is padded: the last normal group of an input is shorter, 64
channels, before the outliers or where there are none.
"""

from math import log

from quatom.families.decoder import Family, decoder
from quatom.families.experts import Spellings, expert_feed
from quatom.families.keys import Keys
from quatom.families.rope import one_rope
from quatom.families.sizes import layer_types, read_sizes, windows
from quatom.families.spec import FeedForward, ModelConfig, Norm, RopeScaling, Router, Spelling

_YARN = RopeScaling(
    kind="yarn",
    factor=32.0,
    original_max_position=4096,
    attention_factor=0.1 * log(32.0) + 1.0,
    truncate=False,
)
"""Of a config.json that says nothing of rotary embedding."""
_SPELLINGS: Spellings = {
    "gate_up": (
        Spelling(("mlp.experts.gate_up_proj",), transposed=True, interleaved=True),
        Spelling(("mlp.experts.gate_up_proj_blocks",), interleaved=True),
    ),
    "gate_up_bias": (Spelling(("mlp.experts.gate_up_proj_bias",), interleaved=True),),
    "down": (
        Spelling(("mlp.experts.down_proj",), transposed=True),
        Spelling(("mlp.experts.down_proj_blocks",)),
    ),
    "down_bias": (Spelling(("mlp.experts.down_proj_bias",)),),
}
"""transformers' tensors, and those of MXFP4 files as they are when they have been dequantized."""


def read(keys: Keys) -> ModelConfig:
    """What a GptOssForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    keys.only("hidden_act", "silu")  # of its clamped form, whose constants kernels know
    keys.only("swiglu_alpha", 1.702)
    keys.only("swiglu_limit", 7.0)
    keys.ignore("initial_context_length")  # yarn's own key says it
    sizes = read_sizes(keys, max_position=131_072, kv_heads=8, head_dim=64)
    feed = expert_feed(
        sizes.hidden,
        count=keys.integer("num_local_experts", "num_experts", default=128),
        top_k=keys.integer("num_experts_per_tok", "experts_per_token", default=4),
        feed_forward=FeedForward(
            size=keys.integer("intermediate_size"), activation="clamped_swiglu"
        ),
        router=Router(normalized=True),
        tensors={"weight": ("mlp.router.weight",), "bias": ("mlp.router.bias",)},
        spellings=_SPELLINGS,
    )
    alternating = ("sliding_attention", "full_attention") * sizes.layers
    types = layer_types(keys, alternating[: sizes.layers])
    bias = keys.flag("attention_bias", default=True)
    return decoder(
        keys,
        sizes,
        one_rope(keys, sizes, theta=150_000.0, scaling=_YARN),
        family="gpt_oss",
        norm=Norm(eps=keys.positive("rms_norm_eps", default=1e-5)),
        feed_forward=(feed,) * sizes.layers,
        windows=windows(types, keys.integer_or_none("sliding_window", default=128)),
        sinks=True,
        attention_bias=bias,
        output_bias=bias,
    )


GPT_OSS = Family(
    name="gpt_oss",
    architectures=("GptOssForCausalLM",),
    model_type="gpt_oss",
    models="gpt-oss-20b and 120b, in bfloat16 and in MXFP4",
    read=read,
)
