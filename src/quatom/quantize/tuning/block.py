"""A decoder block that gradients flow through, rounding included.

It is the block of `quatom.modeling` with three parts exchanged: inputs and cache are rounded
straight through, and whole sequences attend at once. Everything else is the reference of each
operation, which autograd follows.
"""

from torch import Tensor

from quatom.families.spec import SiteName
from quatom.modeling.block import DecoderBlock
from quatom.modeling.context import ForwardContext
from quatom.modeling.inputs import InputQuantizer, NormLayer
from quatom.modeling.linear import FloatLinear, SiteLinear
from quatom.modeling.rotary import RotaryTables
from quatom.modeling.weights import FloatLayer
from quatom.numerics.hadamard import rotate_heads
from quatom.numerics.kv_pages import KVPages
from quatom.numerics.rotary import grow_queries
from quatom.ops.activations import QuantizeSpec
from quatom.ops.attention import AttentionOptions
from quatom.ops.attention.reference import causal_attention
from quatom.ops.backend import Backend
from quatom.ops.experts import summed
from quatom.ops.rope_append_kv.reference import rotate_halves
from quatom.plan import LayerPlan
from quatom.quantize.tuning.straight_through import quantize_head, quantize_input

_CACHE_BITS = {"int4": 4, "int8": 8}


class StraightThroughInput(InputQuantizer):
    """Makes a plain tensor of the values that a quantized input would have."""

    def __init__(self, rounds: QuantizeSpec | None, order: Tensor | None, *, repeats: bool) -> None:
        super().__init__(None, order, Backend.REFERENCE)
        self.rounds, self.repeats = rounds, repeats

    def arrange(self, x: Tensor) -> Tensor:  # (T, K)
        """Channels in reordered position, and what rounding leaves of them."""
        return quantize_input(x, self.order, self.rounds, repeats=self.repeats)


class TunedBlock(DecoderBlock):
    """See the module. It runs equally long whole sequences, and reads no pages."""

    def forward(
        self,
        hidden: Tensor,  # (T, hidden)
        residual: Tensor | None,  # (T, hidden)
        context: ForwardContext,
        kv: KVPages | None,
        rotary: RotaryTables,
    ) -> tuple[Tensor, Tensor]:
        """As that of the block."""
        x, residual = self._input("qkv", "attention", hidden, residual)
        q, k, v = self.heads(self.linears["qkv"](x))
        q, k = self.heads.normalize(q, k)
        attended = self._attend(q, k, v, context, rotary)
        hidden_or_sum, residual = self.after_attention(attended, residual)
        return summed(hidden_or_sum), residual

    def _attend(
        self,
        q: Tensor,  # (T, H, D)
        k: Tensor,  # (T, KV, D)
        v: Tensor,  # (T, KV, D)
        context: ForwardContext,
        rotary: RotaryTables,
    ) -> Tensor:  # (T, H, D)
        spec, cache = self.spec.attention, self.plan.kv_cache
        length, dtype = context.max_seqlen_q, q.dtype
        count = len(q) // length
        cos, sin = (t[:length].repeat(count, 1) for t in rotary.of(self.plan.index))
        q, v = rotate_halves(q, cos, sin), v.float()
        q = grow_queries(q, spec.query_growth, length)
        k = rotate_halves(k, cos, sin) if cache.post_rope else k.float()
        if self.key_offset is not None:
            k = k - self.key_offset
        if cache.rotates_keys:
            q, k = rotate_heads(q), rotate_heads(k)
        if (bits := _CACHE_BITS.get(cache.format)) is not None:
            k, v = (quantize_head(x, bits, cache.clip_ratio) for x in (k, v))
        if not cache.post_rope:
            k = rotate_halves(k, cos, sin)
        # Heads attend alone, so those of all sequences go side by side: (length, count * H, D).
        q, k, v = (
            x.to(dtype).unflatten(0, (count, length)).transpose(0, 1).flatten(1, 2)
            for x in (q, k, v)
        )
        sinks = None if self.sinks is None else self.sinks.repeat(count)
        options = AttentionOptions(spec.scale, spec.window, spec.logit_softcap, sinks=sinks)
        out = causal_attention(q, k, v, options)
        return out.unflatten(1, (count, -1)).transpose(0, 1).flatten(0, 1)


def build_tuned_block(layer: LayerPlan, weights: FloatLayer) -> TunedBlock:
    """The block of a layer under its plan, its weights unrounded.

    `torch.func.functional_call` runs it with other weights: "linears.SITE.weight" and
    "linears.SITE.bias", "norms.NAME.weight", "heads.weights.0" and "heads.weights.1", "key_offset".
    """
    linears: dict[SiteName, SiteLinear] = {}
    inputs: dict[SiteName, InputQuantizer] = {}
    for site, plan in layer.sites.items():
        held = weights.sites[site]
        linears[site] = FloatLinear(held.weight, held.bias)
        order = held.order if plan.order == "gathered" else None
        inputs[site] = StraightThroughInput(plan.input_spec, order, repeats=plan.repeats_channels)
    return TunedBlock(
        layer,
        linears=linears,
        inputs=inputs,
        norms={
            name: NormLayer(layer.spec.norms[name], norm, Backend.REFERENCE)
            for name, norm in weights.norms.items()
        },
        qk_norm=weights.qk_norm,
        key_offset=weights.key_offset,
        sinks=weights.sinks,
        backend=Backend.REFERENCE,
    )
