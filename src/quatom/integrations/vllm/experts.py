"""vLLM's routed experts with Quatom's weights.

vLLM's model computes the scores of all experts; the choice among them is Quatom's, as is what the
chosen experts compute. Experts lie on one rank whole: a recipe's `tensor_parallel` does not cut
them.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from quatom.checkpoint.codec import decode
from quatom.checkpoint.schema import linear_tensors
from quatom.engine.startup import step_sizes
from quatom.errors import CheckpointError, ModelError
from quatom.families.spec import SiteName
from quatom.integrations.vllm.dummy import fill_dummies
from quatom.integrations.vllm.expert_operator import name_expert_scheme
from quatom.integrations.vllm.opaque import hold
from quatom.integrations.vllm.state import CheckpointState
from quatom.ops.activations import QuantizeSpec
from quatom.ops.experts import PreparedExperts, prepare_experts
from quatom.plan import LayerPlan, SitePlan

_SITES: tuple[SiteName, SiteName] = ("experts_gate_up", "experts_down")
_STORED_KINDS = {"w2": "down_proj"}
"""The checkpoint's name of a linear, where vLLM's model renames it on the way."""


class QuatomExpertsMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """Experts of one layer. Stored tensors are loaded as they are, and repacked once after that."""

    is_monolithic = True  # vLLM hands over the scores, not its own choice
    supports_eplb = False

    def __init__(self, moe: Any, state: CheckpointState, layer: LayerPlan) -> None:
        super().__init__(moe)
        self.state, self.layer = state, layer

    def maybe_roundup_sizes(
        self, hidden_size: int, intermediate_size_per_partition: int, *_: Any
    ) -> tuple[int, int]:
        """Sizes stay as they are."""
        return hidden_size, intermediate_size_per_partition

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """None: none of vLLM's kernels runs."""

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Room for the stored tensors.

        Raises:
            ModelError: vLLM's layer has other sizes than the checkpoint's, or a part of it.
        """
        experts = self.layer.spec.experts
        assert experts is not None
        stored = experts.count, self.layer.hidden_size, experts.feed_forward.size
        asked = num_experts, hidden_size, intermediate_size_per_partition
        if asked != stored:
            raise ModelError(
                f"{self.layer.prefix[:-1]}: a rank of vLLM's holds {asked[0]} experts of "
                f"{asked[1]} x {asked[2]}, the checkpoint's {stored[0]} of {stored[1]} x "
                f"{stored[2]} are not cut: run it on one rank"
            )
        loaded: set[str] = set()
        for site in self._sites():
            for name, spec in _tensors(site).items():
                room = torch.empty(spec.shape, dtype=spec.dtype)
                layer.register_parameter(name, nn.Parameter(room, requires_grad=False))
        layer.quatom_loaded = loaded

        def load(weights: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
            for stored_name, tensor in weights:
                kind, _, suffix = stored_name.partition(".")
                name = f"{_STORED_KINDS.get(kind, kind)}_{suffix}"
                if name not in layer._parameters:
                    raise CheckpointError(f"{layer.layer_name} has no tensor {stored_name}")
                layer.get_parameter(name).data.copy_(tensor)
                loaded.add(name)
                yield name

        layer.load_weights = load

    def process_weights_after_loading(self, layer: Any) -> None:
        """Repack the weights for the backend that multiplies them."""
        if get_current_vllm_config().load_config.load_format == "dummy":
            fill_dummies({n.partition("_proj_")[2]: p for n, p in layer.named_parameters()})
        else:
            self._check_loaded(layer.quatom_loaded)
        del layer.quatom_loaded, layer.load_weights
        parts: list[tuple[QuantizeSpec | None, PreparedExperts]] = []
        layer.quatom_order, layer.quatom_weights = None, []
        for site in self._sites():
            prepared, order = self._prepare(layer, site)
            spec = None if site.input_spec is None else prepared.input_spec(site.input_spec)
            parts.append((spec, prepared))
            if order is not None:
                layer.quatom_order = nn.Parameter(order.int(), requires_grad=False)
            layer.quatom_weights.append(hold(layer, f"quatom_{site.name}", prepared.tensors))
        experts = self.layer.spec.experts
        assert experts is not None
        # vLLM multiplies the sum of shared and routed experts itself where its model says so.
        router = replace(experts.router, scale=layer.routed_scaling_factor)
        layer.quatom_scheme = name_expert_scheme(replace(experts, router=router), *parts)
        self.state.note_kernel(str(parts[0][1].backend))
        device = layer.quatom_experts_gate_up_0.device
        if device.type == "cuda":
            self._compile(layer, device)

    def apply_monolithic(
        self, layer: Any, x: Tensor, router_logits: Tensor, input_ids: Tensor | None = None
    ) -> Tensor:  # (T, hidden)
        """What each token's experts make of x (T, hidden), chosen by its scores (T, E)."""
        y: Tensor = torch.ops.quatom.routed_experts(
            x,
            router_logits,
            layer.e_score_correction_bias,
            layer.quatom_order,
            *_weights(layer),
            layer.quatom_scheme,
        )
        return y

    def _sites(self) -> list[SitePlan]:
        return [self.layer.sites[name] for name in _SITES]

    def _check_loaded(self, loaded: set[str]) -> None:
        """Raise CheckpointError where a tensor did not come: vLLM does not look itself."""
        for site in self._sites():
            for name in _tensors(site):
                if name not in loaded:
                    missed = f"{site.linears[0].name}.{name.partition('_proj_')[2]}"
                    raise CheckpointError(
                        f"vLLM's model did not load {missed}: it cannot run this model"
                    )

    def _prepare(self, layer: Any, site: SitePlan) -> tuple[PreparedExperts, Tensor | None]:
        """Weights of a site in the form of a backend, and the order of its input."""
        (linear,) = site.linears
        names = _tensors(site)
        stored = {
            f"{linear.name}.{name.partition('_proj_')[2]}": layer.get_parameter(name).data
            for name in names
        }
        with torch.device(next(iter(stored.values())).device):
            codes = decode(self.layer, site, stored)
        for name in names:
            delattr(layer, name)
        del stored
        prepared = prepare_experts(
            codes.values,
            codes.scales,
            site.layout,
            bias=codes.bias,
            weight_format=site.weights.format,
            activation_format=site.activation_format,
            outlier_format=site.outliers.format,
            scale_mode=site.scale_mode,
        )
        return prepared, codes.order

    def _compile(self, layer: Any, device: torch.device) -> None:
        """Run the kernels once at every size of a step; layers that are alike do it once."""
        alike = layer.quatom_scheme, *(weight.shape for part in _weights(layer) for weight in part)
        if alike in self.state.compiled:
            return
        self.state.compiled.add(alike)
        config, experts = get_current_vllm_config(), self.layer.spec.experts
        assert experts is not None
        for tokens in step_sizes(config.scheduler_config.max_num_batched_tokens):
            x = torch.zeros(
                tokens, self.layer.hidden_size, dtype=config.model_config.dtype, device=device
            )
            self.apply_monolithic(layer, x, x.new_zeros(tokens, experts.count))


def _tensors(site: SitePlan) -> dict[str, Any]:
    """Specs of a site's stored tensors by the names of their parameters: down_proj_row_scale."""
    (linear,) = site.linears
    return {
        f"{linear.kind}_{name.removeprefix(f'{linear.name}.')}": spec
        for name, spec in linear_tensors(site, linear).items()
    }


def _weights(layer: Any) -> list[list[Tensor]]:
    """The tensors that the operator multiplies by: of gate and up, of down."""
    return [[getattr(layer, name) for name in names] for names in layer.quatom_weights]
