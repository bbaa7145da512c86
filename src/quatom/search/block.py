"""One block under a base recipe, and with one place after another raised."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quatom.checkpoint.reader import TensorSource
from quatom.families.spec import SiteName
from quatom.loading import load_float_layer
from quatom.modeling.block import DecoderBlock
from quatom.modeling.build import build_block
from quatom.modeling.rotary import RotaryTables
from quatom.modeling.weights import FloatLayer, LayerWeights, SiteCodes
from quatom.ops.backend import Backend
from quatom.plan import LayerPlan, ModelPlan
from quatom.quantize.lanes import Share
from quatom.quantize.measure import measure_channels, measure_moments
from quatom.quantize.rounding import round_layer
from quatom.quantize.transforms import TransformList
from quatom.recipe import Recipe, WeightSpec
from quatom.search.options import Option


@dataclass(frozen=True, slots=True)
class Setting:
    """What blocks are read from and how they are computed."""

    source: TensorSource
    recipe: Recipe
    """The base."""
    transforms: TransformList
    """Those of the base."""
    float_plan: ModelPlan
    device: torch.device
    dtype: torch.dtype
    backend: Backend | None


class MeasuredBlock:
    """One block: in floating point, under the base recipe, and with options raised."""

    def __init__(
        self,
        setting: Setting,
        layer: LayerPlan,
        hidden: Tensor,  # (sequences, length, hidden) in front of the block
        rotary: RotaryTables,
    ) -> None:
        self.setting, self.layer, self.hidden, self.rotary = setting, layer, hidden, rotary
        weights = load_float_layer(setting.source, layer, setting.device, setting.dtype)
        self.prepared = setting.transforms.prepare(layer, weights)
        float_layer = setting.float_plan.layers[layer.index]
        self.float_module = build_block(float_layer, self.prepared, setting.backend)
        _, self.statistics = measure_channels(self.float_module, hidden, rotary, setting.recipe)
        self.arranged = self._arranged(layer)
        self.moments = self._moments(layer, self.arranged)
        self.codes = self._round(layer, self.arranged, self.moments, tuple(layer.sites))
        self.base = self._build(layer, self.codes)
        self._rounded: dict[tuple[SiteName, WeightSpec], SiteCodes] = {}

    def raised(self, option: Option) -> DecoderBlock:
        """The block with an option, the weights of other places as they are in `base`."""
        layer, codes = option.layer, dict(self.codes)
        own = layer.sites
        cut = [name for name in own if own[name].layout != self.layer.sites[name].layout]
        if cut:
            # Other groups are rotated. The order stays, and so do the rows that make the input:
            # presets have one tensor-parallel block, all of whose channels are ordered.
            arranged = self._arranged(layer)
            codes |= self._round(layer, arranged, self._moments(layer, arranged), tuple(cut))
        for name in own:
            if name not in cut and own[name].weights != self.layer.sites[name].weights:
                key = name, own[name].weights
                if key not in self._rounded:  # for other formats of its input it is the same
                    found = self._round(layer, self.arranged, self.moments, (name,))
                    self._rounded[key] = found[name]
                codes[name] = self._rounded[key]
        return self._build(layer, codes)

    def _arranged(self, layer: LayerPlan) -> FloatLayer:
        return self.setting.transforms.finish(layer, self.prepared, self.statistics)

    def _moments(self, layer: LayerPlan, arranged: FloatLayer) -> dict[str, Tensor]:
        setting = self.setting
        if not setting.recipe.needs_moments:
            return {}
        moments, _ = measure_moments(
            build_block(layer, arranged, setting.backend),
            self.hidden,
            self.rotary,
            tf32=setting.dtype != torch.float32,
            bound=setting.recipe.calibration.min_expert_tokens,
        )
        return moments

    def _round(
        self,
        layer: LayerPlan,
        arranged: FloatLayer,
        moments: dict[str, Tensor],
        sites: tuple[SiteName, ...],
    ) -> dict[SiteName, SiteCodes]:
        own = replace(layer, sites={name: layer.sites[name] for name in sites})
        floats = {name: arranged.sites[name] for name in sites}
        found: dict[str, Tensor] = {name: moments[name] for name in sites if name in moments}
        share, setting = Share.of_one(self.hidden), self.setting
        codes, _, _ = round_layer(own, floats, found, {}, setting.recipe, share, setting.device)
        return codes

    def _build(self, layer: LayerPlan, codes: dict[SiteName, SiteCodes]) -> DecoderBlock:
        rest = self.arranged
        weights = LayerWeights(
            norms=rest.norms,
            sites=codes,
            qk_norm=rest.qk_norm,
            key_offset=rest.key_offset,
            sinks=rest.sinks,
            router=rest.router,
        )
        return build_block(layer, weights, self.setting.backend)
