"""Granite 4 without state-space layers and experts: Granite whose feed-forward layer is shared."""

from quatom.errors import ModelError
from quatom.families.decoder import LINEARS, Family, activation
from quatom.families.granite import multipliers
from quatom.families.keys import Keys
from quatom.families.llama import llama
from quatom.families.rope import Rotary, one_rope
from quatom.families.sizes import read_sizes, same_window
from quatom.families.spec import FeedForward, ModelConfig

_STATE_SPACE = ("mamba", "linear_attention")


def read(keys: Keys) -> ModelConfig:
    """What a GraniteMoeHybridForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported; state-space layers and routed experts are
            not.
    """
    keys.only("position_embedding_type", "rope", "nope")
    keys.ignore("intermediate_size", "num_experts_per_tok")
    keys.ignore(*keys.under("mamba_"), *keys.under("time_step_"))
    sizes = read_sizes(keys, max_position=2048)
    types = keys.value("layer_types", "layers_block_type") or _STATE_SPACE[:1] * sizes.layers
    if other := sum(kind in _STATE_SPACE for kind in types):
        raise ModelError(
            f"{other} of {sizes.layers} layers are state-space layers (Mamba), whose state is no "
            "KV cache: they are not supported"
        )
    if experts := keys.integer("num_local_experts", default=8, least=0):
        raise ModelError(f"num_local_experts {experts} is not supported for this family; 0 is")
    shared = one_rope(keys, sizes)
    turns = keys.value("position_embedding_type") == "rope"
    size = keys.integer("shared_intermediate_size", default=1024)
    return llama(
        keys,
        sizes,
        shared if turns else Rotary((None,) * sizes.layers, shared.max_position),
        family="granitemoehybrid",
        eps=1e-6,
        feed_forward=FeedForward(size=size, activation=activation(keys, default="silu")),
        windows=same_window(keys, sizes.layers, None),
        linears={
            **LINEARS,
            "gate_up": ("shared_mlp.input_linear",),
            "down": ("shared_mlp.output_linear",),
        },
        **multipliers(keys),
    )


GRANITE4 = Family(
    name="granitemoehybrid",
    architectures=("GraniteMoeHybridForCausalLM",),
    model_type="granitemoehybrid",
    models="Granite 4.0 350M, 1B and Micro, but not those with an H",
    read=read,
)
