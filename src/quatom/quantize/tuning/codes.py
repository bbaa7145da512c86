"""Codes, scales of rows, norms and key offset of a rounded layer, as parameters.

A code is the nearest integer of a real number that gradients move. It begins inside the cell of the
code that the rounder chose, as near to the weight as the cell allows: the first loss is that of the
rounder, and codes that were nearly another one change first. The scale of a row moves as a whole,
its multiples stay. Scales of rows and weights of norms hold the balance of channels between
linears, and that between q and k.

Source: learned rounding as in AdaRound (Nagel et al., ICML 2020) and AutoRound (Cheng et al., EMNLP
2024); all parameters of a block at once as in EfficientQAT (Chen et al., ACL 2025).
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from quatom.families.spec import NormName, SiteName
from quatom.modeling.weights import FloatLayer, LayerWeights, NormWeights, SiteCodes
from quatom.numerics.formats import get_format
from quatom.numerics.groups import MIN_SCALE, expand_scales
from quatom.numerics.multiples import LARGEST_MULTIPLE, nearest_row_scales, split_multiples
from quatom.plan import LayerPlan, SitePlan
from quatom.quantize.tuning.straight_through import replace_value, round_through
from quatom.recipe_tuning import TuningSpec

EDGE = 0.4
"""How far from its code a weight may begin, in units of the scale; 0.5 is the edge of the cell. The
rounder has moved many weights out of their cells: at the edge noise alone would take them back."""


class LearnedSite(nn.Module):
    """The weight of one site."""

    def __init__(self, site: SitePlan, weight: Tensor, codes: SiteCodes) -> None:
        super().__init__()
        self.site, self.codes = site, codes
        layout = site.layout
        formats = get_format(site.weights.format), get_format(site.outliers.format)
        largest = weight.new_full((layout.channels,), formats[0].largest, dtype=torch.float32)
        largest[layout.normal :] = formats[1].largest
        self.largest = largest
        values, scales = codes.values.float(), expand_scales(codes.scales, layout)
        start = (weight.float() / scales).clamp(values - EDGE, values + EDGE)
        self.latent = nn.Parameter(start)
        self.shared = site.weights.scale_format != "float16"
        normal = codes.scales[:, : layout.num_normal_groups]
        if self.shared:
            self.row_scales, self.multiples = _coarse_row_scales(normal)
        self.change = nn.Parameter(
            torch.zeros(len(normal), 1 if self.shared else normal.shape[1], device=weight.device)[
                :: site.weights.rows_per_scale
            ].clone()
        )

    def scales(self) -> Tensor:  # (N, S) float32, all float16 numbers
        """Scales of the groups as they are stored."""
        rows = self.site.weights.rows_per_scale
        factor = self.change.exp().repeat_interleave(rows, dim=0)
        layout, stored = self.site.layout, self.codes.scales.float()
        factor = factor[: len(stored)]
        normal, outliers = stored.split((layout.num_normal_groups, layout.num_outlier_groups), 1)
        if self.shared:
            row = self.row_scales * factor
            normal = replace_value(row, _seven_bits(row.detach())) * self.multiples
        else:
            wanted = normal * factor
            normal = replace_value(wanted, wanted.detach().clamp(min=MIN_SCALE).half().float())
        return torch.cat((normal, outliers), dim=1)

    def forward(self) -> Tensor:
        """The weight that codes and scales stand for, (N, K) float32."""
        return round_through(self.latent) * expand_scales(self.scales(), self.site.layout)

    @torch.no_grad()
    def project(self) -> None:
        """Latents back between the smallest and the largest code."""
        torch.minimum(self.latent, self.largest, out=self.latent)
        torch.maximum(self.latent, -1.0 - self.largest, out=self.latent)

    @torch.no_grad()
    def rounded(self) -> SiteCodes:
        """What is stored."""
        return replace(self.codes, values=self.latent.round(), scales=self.scales().half())


def _coarse_row_scales(scales: Tensor) -> tuple[Tensor, Tensor]:  # (N, G) float16
    """Row scales (N, 1) of 7 significant bits and multiples (N, G) up to 16.

    The greatest common divisor of a row may be several times such a number.
    """
    whole, small = (x.unsqueeze(1) if x.ndim == 1 else x for x in split_multiples(scales))
    row_scales, multiples = whole.clone(), small.clone()
    found = _seven_bits(whole) == whole
    for parts in range(2, LARGEST_MULTIPLE + 1):
        part = whole / parts
        fits = ~found & (_seven_bits(part) == part)
        row_scales = torch.where(fits, part, row_scales)
        multiples = torch.where(fits, small * parts, multiples)
        found |= fits
    return row_scales, multiples


def _seven_bits(row_scales: Tensor) -> Tensor:
    return nearest_row_scales(row_scales).clamp(min=MIN_SCALE)


class LearnedCodes(nn.Module):
    """A whole layer."""

    def __init__(
        self,
        layer: LayerPlan,
        floats: FloatLayer,
        codes: Mapping[SiteName, SiteCodes],
        spec: TuningSpec,
    ) -> None:
        super().__init__()
        self.layer, self.floats, self.spec = layer, floats, spec
        self.sites: dict[SiteName, LearnedSite] = {
            name: LearnedSite(layer.sites[name], floats.sites[name].weight, codes[name])
            for name in layer.sites
        }
        self.norms = nn.ParameterDict(
            {
                name: torch.zeros_like(n.weight, dtype=torch.float32)
                for name, n in floats.norms.items()
            }
        )
        self.offset = None
        if floats.key_offset is not None:
            self.offset = nn.Parameter(torch.zeros_like(floats.key_offset))

    def _norm(self, name: NormName) -> Tensor:
        held, offset = self.floats.norms[name], self.layer.spec.norms[name].weight_offset
        weight = (held.weight.float() + offset) * self.norms[name].exp() - offset
        return weight.to(held.weight.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """What `torch.func.functional_call` gives a block of `quatom.quantize.tuning.block`."""
        made: dict[str, Tensor] = {}
        for name, site in self.sites.items():
            weight: Tensor = site()
            made[f"linears.{name}.weight"] = weight.to(self.floats.sites[name].weight.dtype)
        for norm in self.floats.norms:
            made[f"norms.{norm}.weight"] = self._norm(norm)
        start = self.floats.key_offset
        if self.offset is not None and start is not None:
            spread = start.square().mean().sqrt().clamp(min=1e-6)
            made["key_offset"] = start + self.offset * spread
        return made

    def groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """See `quatom.quantize.tuning.descent.Learned`."""
        latents = [site.latent for site in self.sites.values()]
        scales = [site.change for site in self.sites.values()] + list(self.norms.values())
        scales += [] if self.offset is None else [self.offset]
        return [(latents, self.spec.code_rate), (scales, self.spec.scale_rate)]

    def project(self) -> None:
        """Parameters back into what can be stored."""
        for site in self.sites.values():
            site.project()

    @torch.no_grad()
    def finish(self, rounded: LayerWeights) -> LayerWeights:
        """What is stored of the layer that `rounded` was."""
        made = self.tensors()
        norms = {
            name: NormWeights(made[f"norms.{name}.weight"], held.bias)
            for name, held in self.floats.norms.items()
        }
        return replace(
            rounded,
            norms=norms,
            sites={name: site.rounded() for name, site in self.sites.items()},
            key_offset=made.get("key_offset"),
        )
