"""``view.cxc``: ChimeraX commands that open the maps of a result folder as they are meant to be looked at."""

from __future__ import annotations

from collections.abc import Iterable

from cryoiso.core import products
from cryoiso.report.surface_view import RESOLUTION_STOPS, SHARE_STOPS

RULE = (
    "Contour levels are those of CONTENTS.md: half way between the solvent (median outside the mask) and the densest "
    "fifth of the particle, at least five standard deviations of the solvent above it."
)
OPENED = (
    products.WEIGHTED_MAP, products.half_map(1), products.half_map(2), products.RESULT_CORRECTED_MAP,
    products.RESULT_MEASURED, products.RESULT_LOCAL_RESOLUTION,
)  # fmt: skip
"""In this order; the first is model 1. What is not there keeps its number."""
PLAIN = "#6a9ecf"


def view_script(present: Iterable[str], levels: dict[str, float], local_A: tuple[float, float] | None = None) -> str:
    """The commands.

    The corrected map is coloured by the measured share, the weighted map by the local resolution where that was
    measured; half-maps and maps that only give colours are hidden. Without a corrected map the weighted one is shown.

    Args:
        present: names of the files in the folder. levels: contour level of each map.
        local_A: local resolutions of the first and the last colour.
    """
    here = set(present)
    number = {name: i for i, name in enumerate(OPENED, 1) if name in here}
    weighted, corrected = number.get(products.WEIGHTED_MAP), number.get(products.RESULT_CORRECTED_MAP)
    share, local = number.get(products.RESULT_MEASURED), number.get(products.RESULT_LOCAL_RESOLUTION)
    lines = ["# ChimeraX: open this file in the folder that it lies in.", f"# {RULE}"]
    lines += [f"open {name} id {i}" for name, i in number.items()]
    lines += [
        f"volume #{i} style surface step 1 level {levels[name]:.4g} color {PLAIN}"
        for name, i in number.items()
        if name in levels
    ]
    if weighted and local and local_A:
        low, high = local_A
        lines += [f"# local resolution: blue {low:.1f} A, orange {high:.1f} A"]
        lines += [f"color sample #{weighted} map #{local} palette {_palette(RESOLUTION_STOPS, low, high)}"]
    if corrected and share:
        lines += ["# orange: inferred by the network; blue: measured"]
        lines += [f"color sample #{corrected} map #{share} palette {_palette(SHARE_STOPS, 0.0, 1.0)}"]
    hidden = [i for name, i in number.items() if name not in (products.WEIGHTED_MAP, products.RESULT_CORRECTED_MAP)]
    if corrected and weighted:
        lines += ["# the measured map is model 1: show #1 models; hide #4 models"]
        hidden.append(weighted)
    lines += [f"hide #{','.join(map(str, sorted(hidden)))} models"] if hidden else []
    lines += ["set bgColor white", "lighting soft", "view"]
    return "\n".join(lines) + "\n"


def _palette(stops: tuple[tuple[int, int, int], ...], low: float, high: float) -> str:
    """Values with their colours, as ChimeraX reads them."""
    step = (high - low) / (len(stops) - 1)
    return ":".join(f"{low + i * step:.4g},#{r:02x}{g:02x}{b:02x}" for i, (r, g, b) in enumerate(stops))
