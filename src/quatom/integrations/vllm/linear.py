"""vLLM's linears with Quatom's weights."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm.model_executor.utils import set_weight_attrs

from quatom.checkpoint.codec import decode
from quatom.engine.startup import step_sizes
from quatom.errors import CheckpointError, ModelError
from quatom.integrations.vllm.dummy import fill_dummies
from quatom.integrations.vllm.opaque import hold
from quatom.integrations.vllm.operator import name_scheme
from quatom.integrations.vllm.shares import Share, joined_shapes, share_of
from quatom.integrations.vllm.state import CheckpointState
from quatom.loading import rotary_rows
from quatom.modeling.weights import SiteCodes
from quatom.numerics.reorder import inverse_order
from quatom.ops.linear import prepare_weights
from quatom.plan import LayerPlan, SitePlan

_PARTS = {"q": 0, "k": 1, "v": 2}
"""vLLM's names of the linears that QKV joins."""


class QuatomLinearMethod(LinearMethodBase):
    """Linears of one site. Stored tensors are cut as they are loaded, repacked once after that."""

    def __init__(self, state: CheckpointState, layer: LayerPlan, site: SitePlan) -> None:
        self.state, self.layer, self.site = state, layer, site

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: Sequence[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Room for the stored tensors of this rank, under the names that they have in files."""
        share = share_of(
            self.layer,
            self.site,
            self.state.recipe,
            partitions=output_partition_sizes,
            rank=layer.tp_rank,
            degree=layer.tp_size,
        )
        if share.site.channels != input_size_per_partition:
            raise ModelError(
                f"{self.site.title}: vLLM's linear reads {input_size_per_partition} channels, the "
                f"checkpoint's {share.site.channels}"
            )
        layer.quatom_share, layer.quatom_loaded = share, set()
        for suffix, spec in joined_shapes(share.tensors()).items():
            parameter = nn.Parameter(torch.empty(spec.shape, dtype=spec.dtype), requires_grad=False)
            loader = _loader(share, suffix, layer.quatom_loaded)
            set_weight_attrs(parameter, {"weight_loader": loader})
            layer.register_parameter(suffix, parameter)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Repack the loaded slices for the backend that multiplies them."""
        share: Share = layer.quatom_share
        site, device = share.site, layer.weight_packed.device
        if get_current_vllm_config().load_config.load_format == "dummy":
            fill_dummies(dict(layer.named_parameters(recurse=False)))
        else:
            _check_loaded(share, layer.quatom_loaded)
        with torch.device(device):
            codes = in_file_order(share, decode(share.layer, site, _loaded(layer, share)))
        prepared = prepare_weights(
            codes.values,
            codes.scales,
            site.layout,
            weight_format=site.weights.format,
            activation_format=site.activation_format,
            outlier_format=site.outliers.format,
            scale_mode=site.scale_mode,
        )
        spec = None if site.input_spec is None else prepared.input_spec(site.input_spec)
        for suffix in share.tensors():
            delattr(layer, suffix)
        del layer.quatom_share, layer.quatom_loaded
        layer.quatom_scheme = name_scheme(spec, prepared)
        layer.quatom_channels = site.channels
        feed = self.layer.spec.feed_forward
        if spec is not None and site.name == "down" and feed is not None and feed.is_swiglu:
            # vLLM's SiluAndMul is the identity in front of it.
            layer.quatom_gated_scheme = name_scheme(spec, prepared, feed)
        layer.quatom_weights = hold(layer, "quatom_weight", prepared.tensors)
        layer.quatom_order = None
        if codes.order is not None:
            layer.quatom_order = nn.Parameter(codes.order.int(), requires_grad=False)
        if codes.bias is not None:
            layer.bias = nn.Parameter(codes.bias.float(), requires_grad=False)
        self.state.note_kernel(str(prepared.backend))
        if device.type == "cuda":
            self._compile(layer, device)

    def _compile(self, layer: Any, device: torch.device) -> None:
        """Run the kernels once at every size of a step, so that no request waits for a compiler.

        Layers that are alike do it once.
        """
        alike = layer.quatom_scheme, *(weight.shape for weight in _weights(layer))
        if alike in self.state.compiled:
            return
        self.state.compiled.add(alike)
        config = get_current_vllm_config()
        channels = layer.quatom_channels * (2 if hasattr(layer, "quatom_gated_scheme") else 1)
        for tokens in step_sizes(config.scheduler_config.max_num_batched_tokens):
            dtype = config.model_config.dtype
            self.apply(layer, torch.zeros(tokens, channels, dtype=dtype, device=device))

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply x (..., K), or what gate and up made (..., 2 K), bias added: (..., N)."""
        whole = x.shape[-1] != layer.quatom_channels  # see `quatom.integrations.vllm.activation`
        y = torch.ops.quatom.site_linear(
            x.reshape(-1, x.shape[-1]),
            layer.quatom_order,
            _weights(layer),
            bias,
            layer.quatom_gated_scheme if whole else layer.quatom_scheme,
        )
        return y.view(*x.shape[:-1], y.shape[-1])


def _weights(layer: Any) -> list[Tensor]:
    """The tensors that the operator multiplies by."""
    return [getattr(layer, name) for name in layer.quatom_weights]


def in_file_order(share: Share, codes: SiteCodes) -> SiteCodes:
    """Rows of q and k where vLLM's model turns them: as in the files of its family."""
    if share.site.name != "qkv":
        return codes
    attention = share.layer.spec.attention
    q, k, _ = (piece.rows // attention.head_dim for piece in share.pieces)
    rows = rotary_rows(replace(attention, num_heads=q, num_kv_heads=k))
    if rows is None:
        return codes
    back = inverse_order(rows).to(codes.values.device)
    bias = None if codes.bias is None else codes.bias[back]
    return SiteCodes(codes.values[back], codes.scales[back], bias, codes.order)


def _loader(share: Share, suffix: str, loaded: set[tuple[str, int]]) -> Any:
    """What vLLM hands a stored tensor to: the parameter, the tensor, which part it is."""

    def load(parameter: nn.Parameter, stored: Tensor, part: str | int | None = None) -> None:
        linear = _PARTS[part] if isinstance(part, str) else part or 0
        specs = share.tensors()[suffix]
        for number, piece in share.slices(suffix, stored, linear).items():
            loaded.add((suffix, number))
            if suffix == "order":
                parameter.data[number].copy_(piece)
                continue
            start = sum(spec.shape[0] for spec in specs[:number])
            parameter.data.narrow(0, start, piece.shape[0]).copy_(piece)

    return load


def _check_loaded(share: Share, loaded: set[tuple[str, int]]) -> None:
    """Raise CheckpointError where vLLM handed a tensor over to nobody: it does not look itself."""
    for suffix in share.tensors():
        for number, piece in enumerate(share.pieces):
            if (suffix, number) not in loaded:
                name = f"{share.stored.linears[piece.linear].name}.{suffix}"
                raise CheckpointError(f"vLLM's model did not load {name}: it cannot run this model")


def _loaded(layer: Any, share: Share) -> dict[str, Tensor]:
    """The loaded tensors by the names of the rank's own linears."""
    found: dict[str, Tensor] = {}
    linears = share.site.linears
    for suffix, specs in share.tensors().items():
        joined = getattr(layer, suffix).data
        rows = [1 if suffix == "order" else spec.shape[0] for spec in specs]
        for linear, part in zip(linears, joined.split(rows), strict=True):
            found[f"{linear.name}.{suffix}"] = part.squeeze(0) if suffix == "order" else part
    if share.site.bias:
        if layer.bias is None:
            raise CheckpointError(f"{share.stored.title} has a bias, vLLM's linear has none")
        for linear in linears:
            found[f"{linear.name}.bias"] = layer.bias.data[linear.row_range]
    return found
