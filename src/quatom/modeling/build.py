"""The one place where a decoder block is assembled from its plan and its weights."""

from quatom.modeling.block import DecoderBlock
from quatom.modeling.inputs import InputQuantizer, NormLayer
from quatom.modeling.linear import (
    FloatExperts,
    FloatLinear,
    QuantizedExperts,
    QuantizedLinear,
    SiteLinear,
)
from quatom.modeling.rotated import RotatedLinear, input_rotation, output_rotations
from quatom.modeling.weights import FloatSite, LayerWeights, SiteCodes
from quatom.ops.backend import Backend
from quatom.ops.experts import PreparedExperts, prepare_experts
from quatom.ops.linear import prepare_weights
from quatom.plan import LayerPlan, SitePlan


def build_block(
    layer: LayerPlan, weights: LayerWeights, backend: Backend | None = None
) -> DecoderBlock:
    """A block on the device of its weights.

    Inputs and KV cache are as the plan says. Sites may hold floats or codes: float weights under
    a plan that quantizes activations are the network that calibration runs.

    Args:
        layer: what the layer computes, and how it is quantized.
        weights: floats, or codes as `quatom.checkpoint.codec.decode` gives them.
        backend: implementation of the operations; None picks by device.

    Raises:
        BackendError: the backend asked for cannot run these formats on this device.
    """
    linears, inputs = {}, {}
    for site, plan in layer.sites.items():
        linears[site], inputs[site] = build_site(plan, weights.sites[site], backend)
    return DecoderBlock(
        layer,
        linears=linears,
        inputs=inputs,
        norms={
            name: NormLayer(layer.spec.norms[name], norm, backend)
            for name, norm in weights.norms.items()
        },
        qk_norm=weights.qk_norm,
        key_offset=weights.key_offset,
        sinks=weights.sinks,
        router=weights.router,
        backend=backend,
    )


def build_site(
    plan: SitePlan, held: FloatSite | SiteCodes, backend: Backend | None = None
) -> tuple[SiteLinear | RotatedLinear, InputQuantizer]:
    """The linear of a site, and the quantizer of its input in the byte layout that it reads.

    Raises:
        BackendError: the backend asked for cannot run these formats on this device.
    """
    device = held.weight.device if isinstance(held, FloatSite) else held.values.device
    linear = _build_linear(plan, held, backend)
    spec, order = plan.input_spec, held.order if plan.order == "gathered" else None
    if spec is not None and isinstance(linear, QuantizedLinear | QuantizedExperts):
        spec = linear.prepared.input_spec(spec)
    if order is not None:
        order = order.to(device)
    inputs = InputQuantizer(spec, order, backend, input_rotation(plan, device))
    outputs = output_rotations(plan, device)
    return (RotatedLinear(linear, outputs) if outputs else linear), inputs


def _build_linear(
    plan: SitePlan, held: FloatSite | SiteCodes, backend: Backend | None
) -> SiteLinear:
    if isinstance(held, FloatSite):
        floats = FloatLinear if plan.experts is None else FloatExperts
        return floats(held.weight, held.bias)
    prepare = prepare_weights if plan.experts is None else prepare_experts
    prepared = prepare(
        held.values,
        held.scales,
        plan.layout,
        bias=held.bias,
        weight_format=plan.weights.format,
        activation_format=plan.activation_format,
        outlier_format=plan.outliers.format,
        scale_mode=plan.scale_mode,
        backend=backend,
    )
    if isinstance(prepared, PreparedExperts):
        return QuantizedExperts(prepared)
    return QuantizedLinear(prepared)
