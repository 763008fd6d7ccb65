"""The result folder of a run: the last poses and maps as they are, FSC curves for EMDB, and checksums."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

from cryoiso.core import products
from cryoiso.io.atomic import atomic_path, write_text
from cryoiso.io.mrc import copy_labelled
from cryoiso.io.star.passed_on import copy_shared

COPIED = (*products.HALF_MAPS, products.MAP, products.WEIGHTED_MAP, products.MASK)
"""Of the stage ``reconstruct``, byte by byte."""
ADDITIONAL = {
    products.CORRECTED_MAP: (products.RESULT_CORRECTED_MAP, "additional map: network-corrected, not a half-map"),
    products.MEASURED: (products.RESULT_MEASURED, "additional map: measured share of the power (0-1), not a density"),
}
"""What a result takes from the stage ``correct``: name there, name here and label; nothing that could be taken for a
half-map."""
CURVES = {
    products.FSC_XML: ("fsc_corrected", "Half-map FSC, masked, corrected by phase randomisation"),
    products.FSC_UNMASKED_XML: ("fsc_unmasked", "Half-map FSC, unmasked"),
}


LOCAL_LABEL = "additional map: local resolution in angstroms, not a density"


def fill_result(
    result: Path, particles: Path, maps: Path, corrected: Path | None, numbers: dict[str, Any],
    local_resolution: Path | None = None,
) -> None:  # fmt: skip
    """Copies the results into their folder, and writes the FSC curves. What is passed on names no folder of the user's.

    Args:
        particles: STAR file with the last poses. maps: folder of the final half-maps.
        corrected: folder of the corrected maps, if there are any.
        numbers: what `diagnose` measured.
        local_resolution: that map, where it was measured.
    """
    result.mkdir(exist_ok=True)
    copy_shared(particles, result / products.PARTICLES)
    for file in (maps / name for name in COPIED):
        with atomic_path(result / file.name, file.stat().st_size) as part:
            shutil.copyfile(file, part)
    if local_resolution is not None and local_resolution.exists():
        copy_labelled(local_resolution, result / products.RESULT_LOCAL_RESOLUTION, LOCAL_LABEL)
    for name, (to, label) in ADDITIONAL.items():
        if corrected is not None:
            copy_labelled(corrected / name, result / to, label)
    for name, (key, title) in CURVES.items():
        if numbers.get(key):
            write_text(result / name, fsc_xml(numbers["frequency_invA"], numbers[key], title))


def fsc_xml(frequency_invA: list[float], curve: list[float | None], title: str) -> str:
    """A curve in the XML that EMDB takes: root ``fsc`` with the two axes' names, a ``coordinate`` for each point.

    Args:
        frequency_invA: ascending. curve: correlation at each; None, where it could not be had, is left out.
    """
    points = [
        f"  <coordinate>\n    <x>{x:.6f}</x>\n    <y>{y:.6f}</y>\n  </coordinate>"
        for x, y in zip(frequency_invA, curve, strict=True)
        if y is not None
    ]
    head = f'<fsc title={quoteattr(title)} xaxis="Resolution (A-1)" yaxis="Correlation Coefficient">'
    return "\n".join(['<?xml version="1.0" encoding="UTF-8"?>', head, *points, "</fsc>"]) + "\n"
