"""A table of the formats of a plan, for `quatom inspect` and `quatom search`."""

from quatom.cli.common import print_table
from quatom.plan import LayerPlan, ModelPlan
from quatom.search.merge import in_ranges


def print_formats(resolved: ModelPlan) -> None:
    """Formats of every place, those of its recipe's own layers first."""
    header = ("place", "layers", "weights x activations")
    title = f"Formats of {resolved.recipe.name}"
    print_table(title, header, format_rows(resolved), text=True)


def format_rows(resolved: ModelPlan) -> list[tuple[str, str, str]]:
    """Layers, place and formats, layers of equal formats in one row."""
    rows: dict[tuple[str, str], list[int]] = {}
    for layer in resolved.layers:
        for place, formats in _formats(layer).items():
            rows.setdefault((place, formats), []).append(layer.index)
    order = {place: number for number, place in enumerate(_places(resolved))}
    found = sorted(rows.items(), key=lambda row: (order[row[0][0]], row[1][0]))
    return [(place, in_ranges(layers), formats) for (place, formats), layers in found]


def _places(resolved: ModelPlan) -> list[str]:
    return list(dict.fromkeys(place for layer in resolved.layers for place in _formats(layer)))


def _formats(layer: LayerPlan) -> dict[str, str]:
    """Formats of each site, and of the KV cache."""
    found: dict[str, str] = {}
    for name, site in layer.sites.items():
        formats = f"{site.weights.format} x {site.activation_format}"
        if site.layout.outliers:
            formats += f", {site.layout.outliers} outliers"
        found[name] = formats
    return found | {"kv_cache": layer.kv_cache.format}
