"""What a result folder needs for EMDB and EMPIAR beside the maps: a picture, a methods text, and what goes where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cryoiso import __version__
from cryoiso.core import products
from cryoiso.core.types import DensityMap
from cryoiso.io.atomic import atomic_write, write_text
from cryoiso.io.mrc import read_map
from cryoiso.methods.assess.emdb_flags import sentences
from cryoiso.report.collect import collect
from cryoiso.report.methods_text import final_counts, methods, warnings, workflow
from cryoiso.report.quoted import WITHOUT_A_MASK, quoted_resolution
from cryoiso.report.records import ReportData
from cryoiso.report.sharing import for_others
from cryoiso.report.surface import contour_level, surface_png
from cryoiso.report.surface_view import LEAST_RANGE
from cryoiso.report.text import number, section
from cryoiso.report.view_script import view_script

IMAGE, METHODS, CONTENTS, DEPOSITION = "image_500x500.png", "METHODS.md", "CONTENTS.md", "deposition.json"
PRIMARY = products.WEIGHTED_MAP
"""The map that is recommended as an entry's primary one."""
Row = tuple[str, str, str]
ROLES: tuple[Row, ...] = (
    (PRIMARY, "EMDB: primary map",
     "of all particles, every Fourier coefficient weighted by how well it was measured (Wiener filter); not masked, "
     "not sharpened by a B-factor, no network"),
    (products.half_map(1), "EMDB: half map 1",
     "as reconstructed: not masked, filtered or sharpened, touched by no network"),
    (products.half_map(2), "EMDB: half map 2", "the same of the other half-set"),
    (products.MASK, "EMDB: mask", "the mask of the FSC (not applied to any map)"),
    (products.MAP, "EMDB: additional map", "plain mean of the half-maps, to sharpen it as you like"),
    (products.RESULT_CORRECTED_MAP, "EMDB: additional map",
     "**network-corrected**: missing directions were filled in; no half-map, no resolution; its MRC label says so"),
    (products.RESULT_MEASURED, "EMDB: additional map, or not at all",
     "voxel by voxel, the share (0 to 1) of the corrected map's local power that was measured; not a density"),
    (products.RESULT_LOCAL_RESOLUTION, "EMDB: additional map, or not at all",
     "voxel by voxel, the local resolution of the half-maps in Å; not a density"),
    (products.FSC_XML, "EMDB: FSC curve",
     "of the half-maps, corrected for the mask; the resolution is read from this curve"),
    (products.FSC_UNMASKED_XML, "EMDB: FSC curve, or not at all", "of the half-maps without a mask"),
    (IMAGE, "EMDB: image of the map", f"surface of {PRIMARY} at the contour level below, z upwards"),
    (products.PARTICLES, "EMPIAR: beside the particle stacks",
     "every particle with its last pose, RELION format; image names are those of the input (absolute ones begin at the "
     "folder that all have in common), so deposit the stacks under these names"),
    (products.CS_PARTICLES, "-", "the same particles and poses for cryoSPARC, with the uids of its own"),
    (METHODS, "the paper; EMDB: image processing", "methods text with the parameters really used, and references"),
    (products.VIEW_SCRIPT, "-", "ChimeraX commands: opens these maps at their levels, coloured by what was measured"),
    (DEPOSITION, "for programs", "the numbers of this page"),
    (CONTENTS, "-", "this page"),
    (products.SUMS, "EMPIAR: beside the files", "checksums; `sha256sum -c SHA256SUMS` checks them"),
)  # fmt: skip
"""Name, where it goes, what it is."""
UNMASKED_ROLES: dict[str, Row] = {
    products.FSC_XML: (products.FSC_XML, "EMDB: not at all",
                       "of the half-maps, corrected for the mask, which makes much of it"),
    products.FSC_UNMASKED_XML: (products.FSC_UNMASKED_XML, "EMDB: FSC curve",
                                "of the half-maps without a mask; the resolution is read from this curve"),
}  # fmt: skip
"""What is said instead where the mask makes the agreement."""


def deposit(folder: Path) -> None:
    """Writes picture, METHODS.md, CONTENTS.md and deposition.json into the result folder of a run folder.

    Everything follows from the run's files: the same run gives the same bytes.

    Raises:
        InputError: not a run folder, or a file of it cannot be read.
    """
    result = folder / "result"
    data = for_others(collect(folder), folder)
    density, mask = read_map(result / PRIMARY), read_map(result / products.MASK)
    levels = {
        name: contour_level(read_map(result / name), mask.data)
        for name in (PRIMARY, products.MAP, *products.HALF_MAPS, products.RESULT_CORRECTED_MAP)
        if (result / name).exists()
    }
    with atomic_write(result / IMAGE) as stream:
        stream.write(surface_png(density, levels[PRIMARY], mask.data))
    write_text(result / METHODS, methods(data))
    here = [row[0] for row in ROLES if (result / row[0]).exists()]
    write_text(result / products.VIEW_SCRIPT, view_script(here, levels, _local_range(data)))
    written = (CONTENTS, DEPOSITION, products.SUMS, products.VIEW_SCRIPT)
    present = [row for row in ROLES if (result / row[0]).exists() or row[0] in written]
    if quoted_resolution(data["diagnose"])[1] == WITHOUT_A_MASK:
        present = [UNMASKED_ROLES.get(row[0], row) for row in present]
    facts = _facts(data, density, levels, present)
    write_text(result / DEPOSITION, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    write_text(result / CONTENTS, _contents(facts, present, data))


def _local_range(data: ReportData) -> tuple[float, float] | None:
    """Local resolutions between which colours change."""
    at = section(section(data["diagnose"], "local_resolution"), "percentiles_A")
    low, high = number(at, "5"), number(at, "95")
    return None if low is None or high is None else (low, max(high, LEAST_RANGE * low))


def _facts(data: ReportData, density: DensityMap, levels: dict[str, float], rows: list[Row]) -> dict[str, Any]:
    counts, (resolution_A, criterion) = final_counts(data), quoted_resolution(data["diagnose"])
    return {
        "schema": 1,
        "program": f"cryoiso {__version__}",
        "workflow": workflow(data),
        "primary_map": PRIMARY,
        "resolution_A": resolution_A,
        "resolution_criterion": criterion,
        "symmetry": section(data["job"], "sample").get("symmetry"),
        "particles_given": data["ingest"].get("particles"),
        "particles_in_maps": sum(counts) or None,
        "half_counts": counts,
        "box_px": density.box_px,
        "pixel_size_A": round(density.pixel_size_A, 6),
        "contour_levels": {name: float(f"{level:.4g}") for name, level in levels.items()},
        "warnings": warnings(data),
        "emdb_flags": data["diagnose"].get("emdb_flags") or [],
        "files": {name: {"goes_to": role.replace("**", ""), "is": what.replace("**", "")} for name, role, what in rows},
    }


def _contents(facts: dict[str, Any], rows: list[Row], data: ReportData) -> str:
    table = ["| file | goes to | what it is |", "|---|---|---|"]
    table += [f"| `{name}` | {role} | {what} |" for name, role, what in rows]
    levels = ["| map | contour level to begin with |", "|---|---|"]
    levels += [f"| `{name}` | {level:g} |" for name, level in facts["contour_levels"].items()]
    known = f"{facts['resolution_A']:.2f} Å, {facts['resolution_criterion']}" if facts["resolution_A"] else "not known"
    asked = [
        f"- Resolution: {known}",
        f"- Particles used in the final reconstruction: {facts['particles_in_maps'] or 'not known'}",
        f"- Point symmetry: {facts['symmetry']}",
        f"- Voxel: {facts['pixel_size_A']:g} Å in each direction; box {facts['box_px']}; origin 0, axes x, y, z",
    ]
    parts = [
        "# What is in this folder, and where it goes", "\n".join(table),
        "EMDB asks for the primary map, both half-maps, and an image of 500 x 500 pixels; mask, FSC and additional "
        "maps are "
        "welcome. All maps here lie on one grid.",
        "## What EMDB asks", "\n".join(asked), "\n".join(levels),
        "Contour levels lie half way between solvent and the densest fifth of the particle. Look at each map and "
        "change "
        "them to what shows the particle.",
        "## Which map is the primary one", _primary(facts),
    ]  # fmt: skip
    if facts["warnings"]:
        parts += ["## To be said with the entry", "\n".join(f"- {text}" for text in facts["warnings"])]
    if said := sentences(facts["emdb_flags"]):
        parts += ["## What EMDB's automatic checks will flag", "\n".join(f"- {text}" for text in said)]
    return "\n\n".join(parts) + "\n"


def _primary(facts: dict[str, Any]) -> str:
    text = (
        f"`{PRIMARY}`: the resolution, the figures and the diagnosis of this run are about it, and directions "
        "that few images saw are damped in it by what they are worth instead of filling it with their noise. "
        "`map.mrc` keeps that noise, and all beyond the resolution; it is the mean that anybody can make of the "
        "half-maps. If "
        "you built your model into a map that you sharpened yourself, that one is the primary map: deposit it instead, "
        f"with its B-factor, and `{PRIMARY}` as an additional map."
    )
    if products.RESULT_CORRECTED_MAP in facts["contour_levels"]:
        text += " The corrected map is never the primary one: part of it was not measured, and no resolution belongs "
        text += "to it. "
        text += "Where a figure or a model rests on it, deposit it as an additional map and say so."
    return text
