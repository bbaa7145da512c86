"""One decoder block of any family, floating-point and quantized alike.

For T packed tokens of any number of sequences:

    hidden, residual -> norm -> q, k, v -> rotate, append to the KV cache, attend -> o -> norm
                     -> norm -> gate, up -> activation(gate) * up -> down -> norm

In a parallel layer the second line reads what the first one reads, and both results are added.
A layer with routed experts runs the last line, between its norms, through each token's experts
instead, or besides.

What differs between families is data (`quatom.families.spec.Layer`): which of the norms there are,
sizes, windows, activations. What differs between recipes is which linear and which `InputQuantizer`
a block holds, and the format of the KV cache. Nothing here asks for a family or a precision.
"""

from collections.abc import Mapping
from typing import cast

from torch import Tensor, nn

from quatom.families.spec import Attention, NormName, RouterTensor, SiteName
from quatom.modeling.context import ForwardContext
from quatom.modeling.inputs import InputQuantizer, NormLayer
from quatom.modeling.linear import QuantizedExperts, SiteLinear
from quatom.modeling.rotary import RotaryTables
from quatom.modeling.rotated import RotatedLinear
from quatom.modeling.router import ExpertRouter
from quatom.numerics.kv_pages import KVPages
from quatom.ops.activations import MixedTensor
from quatom.ops.attention import attention
from quatom.ops.backend import Backend
from quatom.ops.experts import ExpertSum, group_tokens, summed
from quatom.ops.head_norm import HeadNorms, head_norm
from quatom.ops.rope_append_kv import rope_append_kv
from quatom.plan import LayerPlan


class Heads(nn.Module):
    """The joined output of q, k and v, cut into heads, and how q and k are normalized."""

    def __init__(
        self,
        spec: Attention,
        norms: tuple[Tensor, Tensor] | None,  # weights of the norms of q and k
        backend: Backend | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.backend = backend
        self.weights = None if norms is None else nn.ParameterList(norms).requires_grad_(False)

    def forward(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(T, (H + 2 KV) * D) -> q (T, H, D), k (T, KV, D) and v (T, KV, D)."""
        spec = self.spec
        heads = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
        q, k, v = qkv.unflatten(-1, (-1, spec.head_dim)).split(heads, dim=1)
        return q, k, v

    @property
    def norms(self) -> HeadNorms | None:
        """Norms of q and k, where the model has them."""
        if self.weights is None:
            return None
        assert self.spec.qk_norm is not None
        q_weight, k_weight = self.weights
        return HeadNorms(q_weight, k_weight, self.spec.qk_norm, self.spec.qk_norm_axis)

    def normalize(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Heads (T, H, D) and (T, KV, D) as rotary embedding takes them."""
        if (norms := self.norms) is None:
            return q, k
        return head_norm(q, k, norms, backend=self.backend)


class DecoderBlock(nn.Module):
    """Attention and feed-forward layer with their norms. `quatom.modeling.build` makes it."""

    key_offset: Tensor | None
    sinks: Tensor | None
    shared_gate: Tensor | None

    def __init__(
        self,
        plan: LayerPlan,
        *,
        linears: Mapping[SiteName, SiteLinear | RotatedLinear],
        inputs: Mapping[SiteName, InputQuantizer],
        norms: Mapping[NormName, NormLayer],
        qk_norm: tuple[Tensor, Tensor] | None = None,
        key_offset: Tensor | None = None,  # (KV, D) float32
        sinks: Tensor | None = None,  # (H,) float32
        router: Mapping[RouterTensor, Tensor] | None = None,  # where there are routed experts
        backend: Backend | None = None,
    ) -> None:
        super().__init__()
        self.plan = plan
        self.spec = plan.spec
        self.backend = backend
        self.linears = nn.ModuleDict({site: linears[site] for site in plan.sites})
        self.inputs = nn.ModuleDict({site: inputs[site] for site in plan.sites})
        self.norms = nn.ModuleDict({name: norms[name] for name in norms})
        self.heads = Heads(plan.spec.attention, qk_norm, backend)
        self.register_buffer("key_offset", key_offset, persistent=False)
        self.register_buffer("sinks", sinks, persistent=False)
        # Of the backends that multiply, the reference alone has grouping and sums of its own.
        self.routing_backend = backend if backend == Backend.REFERENCE else None
        experts, tensors = plan.spec.experts, router or {}
        self.router = (
            None if experts is None else ExpertRouter(experts, tensors, self.routing_backend)
        )
        self.register_buffer("shared_gate", tensors.get("shared_gate"), persistent=False)
        first, then = (linears.get(site) for site in ("experts_gate_up", "experts_down"))
        if isinstance(first, QuantizedExperts) and isinstance(then, QuantizedExperts):
            first.following = then.prepared

    def forward(
        self,
        hidden: Tensor,  # (T, hidden)
        residual: Tensor | None,  # (T, hidden); None in the first block
        context: ForwardContext,
        kv: KVPages,
        rotary: RotaryTables,
    ) -> tuple[Tensor, Tensor]:
        """Returns the block's last output, not yet added, and the residual to add it to."""
        q, residual = self.before_attention(hidden, residual, context, kv, rotary)
        attended = self.attend(q, context, kv=kv, rotary=rotary)
        hidden_or_sum, residual = self.after_attention(attended, residual)
        return summed(hidden_or_sum), residual

    def before_attention(
        self,
        hidden: Tensor | ExpertSum,  # (T, hidden)
        residual: Tensor | None,  # (T, hidden); None in the first block
        context: ForwardContext,
        kv: KVPages,
        rotary: RotaryTables,
    ) -> tuple[Tensor, Tensor]:
        """Queries (T, H, D) and the residual. Appends keys and values to the cache.

        Of the context this reads positions and slot_mapping alone.
        """
        x, residual = self._input("qkv", "attention", hidden, residual)
        heads: tuple[Tensor, Tensor, Tensor] = self.heads(self.linears["qkv"](x))
        tables, cache = rotary.of(self.plan.index), self.plan.kv_cache
        q = rope_append_kv(
            *heads,
            *tables,
            context.positions,
            context.slot_mapping,
            kv,
            norms=self.heads.norms,
            rotate_keys_in_cache=cache.post_rope,
            rotate_kv=cache.rotates_keys,
            clip_ratio=cache.clip_ratio,
            key_offset=self.key_offset,
            shared=context.shared,
            settled=True,  # what the context holds was there before the step's first kernel
            backend=self.backend,
        )
        if (scales := rotary.query_scales(self.plan.index)) is not None:
            q.mul_(scales[context.positions].view(-1, 1, 1))  # in float32, rounded once
        return q, residual

    def after_attention(
        self,
        attended: Tensor,  # (T, H, D)
        residual: Tensor,  # (T, hidden)
    ) -> tuple[Tensor | ExpertSum, Tensor]:
        """The block's last output, not yet added, and the residual to add it to.

        What experts alone give is not added up yet: `before_attention` does.
        """
        hidden = self.linears["o"](self._input_of("o").plain(attended.flatten(1)))
        hidden = self._output("attention_output", hidden)
        if self.spec.parallel:
            norm: NormName = "attention" if self.spec.shares_norm else "feed_forward"
            x, _ = self._input("gate_up", norm, residual, None)
            return hidden + self._output("feed_forward_output", self._feed(x)), residual
        if self.spec.experts is None:
            x, residual = self._input("gate_up", "feed_forward", hidden, residual)
            hidden = self._feed(x)
        else:
            mixed, residual = self._mix(hidden, residual)
            if not self._changes("feed_forward_output"):
                return mixed, residual
            hidden = summed(mixed)
        return self._output("feed_forward_output", hidden), residual

    def _feed(self, x: Tensor | MixedTensor) -> Tensor:
        """The dense feed-forward layer of the input of gate and up."""
        spec = self.spec.feed_forward
        assert spec is not None
        x = self._input_of("down").activate(self.linears["gate_up"](x), spec)
        return cast("Tensor", self.linears["down"](x))

    def _mix(self, hidden: Tensor, residual: Tensor) -> tuple[Tensor | ExpertSum, Tensor]:
        """What a token's experts give, and the residual: the router reads what no format rounds."""
        experts = self.spec.experts
        assert experts is not None
        assert self.router is not None
        inputs = self._input_of("experts_gate_up")
        if "feed_forward" in self.spec.norms:
            layer = cast("NormLayer", self.norms["feed_forward"])
            x, normed, residual = inputs.norm_kept(hidden, residual, layer)
        else:
            normed = residual = hidden + residual
            x = inputs.plain(normed)
        routing = self.router(normed)
        groups = group_tokens(routing.expert_ids, experts.count, backend=self.routing_backend)
        x = self.linears["experts_gate_up"](x, groups, experts.top_k)
        x = self._input_of("experts_down").activate(x, experts.feed_forward)
        y = self.linears["experts_down"](x, groups, None)
        mixed = ExpertSum(y, groups, routing.weights, self.routing_backend)
        if self.spec.feed_forward is None:
            return mixed, residual
        shared = self._feed(self._input_of("gate_up").plain(normed))
        if self.shared_gate is not None:
            gate = nn.functional.linear(normed.float(), self.shared_gate).sigmoid()
            shared = shared * gate.to(shared.dtype)
        return mixed.combine() + shared, residual

    def _input(
        self, site: SiteName, norm: NormName, hidden: Tensor | ExpertSum, residual: Tensor | None
    ) -> tuple[Tensor | MixedTensor, Tensor]:
        """The input of a site's linears, and the residual of what comes next."""
        layer = cast("NormLayer", self.norms[norm]) if norm in self.spec.norms else None
        return self._input_of(site).norm(hidden, residual, layer)

    def _input_of(self, site: SiteName) -> InputQuantizer:
        return cast("InputQuantizer", self.inputs[site])

    def _changes(self, norm: NormName) -> bool:
        """Whether `_output` does anything."""
        return norm in self.spec.norms or self.spec.residual_multiplier != 1.0

    def _output(self, norm: NormName, hidden: Tensor) -> Tensor:
        """What is added to the residual: normalized and scaled where the model does."""
        if norm in self.spec.norms:
            hidden, _ = self.norms[norm](hidden)
        if self.spec.residual_multiplier != 1.0:
            hidden = hidden * self.spec.residual_multiplier
        return hidden

    def attend(
        self,
        q: Tensor,  # (T, H, D)
        context: ForwardContext,
        *,
        kv: KVPages,
        rotary: RotaryTables,
        out: Tensor | None = None,  # (T, H, D): where the result is written
    ) -> Tensor:
        """What the queries see of their sequences, (T, H, D)."""
        spec = self.spec.attention
        return attention(
            q,
            kv,
            block_tables=context.block_tables,
            cu_seqlens_q=context.cu_seqlens_q,
            seq_lens=context.seq_lens,
            max_seqlen_q=context.max_seqlen_q,
            max_seq_len=context.max_seq_len,
            softmax_scale=spec.scale,
            sliding_window=spec.window,
            logit_softcap=spec.logit_softcap,
            sinks=self.sinks,
            rotary=None if self.plan.kv_cache.post_rope else rotary.of(self.plan.index),
            num_decodes=context.num_decodes,
            total_kv_tokens=context.total_kv_tokens,
            prefill_cu_seqlens=context.prefill_cu_seqlens,
            shared=context.shared,
            settled=True,  # what the context holds was there before the step's first kernel
            out=out,
            backend=self.backend,
        )
