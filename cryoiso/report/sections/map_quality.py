"""Local resolution, an atomic model against the map, and what EMDB will flag: figures, words and rows of numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cryoiso.core import products
from cryoiso.core.records import DiagnoseRecord
from cryoiso.methods.assess import emdb_flags
from cryoiso.report.run_reader import stage_folder
from cryoiso.report.sections.correct import Slices, planes
from cryoiso.report.sections.map_quality_figures import LOCAL
from cryoiso.report.text import Entry, Text, number, numbers_of, section

MODEL = "model"
LOCAL_CAPTION = (
    "Slices through the centre, coloured by the local resolution of the half-maps inside the mask; lines surround the "
    "density. On the right its distribution over the mask. Window {window:.0f} Å (full width at half maximum), local "
    "FSC {threshold:g}; {coarsest:.1f} Å means this or worse."
)
MODEL_CAPTION = (
    "Left: Fourier shell correlation of the map and the density of the model ({placed}). Right: Q-score of each "
    "residue (reference Gaussian of {sigma:g} Å), mean over five residues; 1 is a resolved atom, 0 no density. Q falls "
    "where the model is wrong, the particle moves or directions are missing, and depends on how the map was sharpened."
)


def collect_slices(folder: Path) -> Slices:
    """Central planes of the local resolution, the map and the mask; empty where it was not measured."""
    from cryoiso.io.mrc import read_map

    reconstruct_folder, local = (
        stage_folder(folder, "reconstruct"),
        stage_folder(folder, "diagnose") / products.LOCAL_RESOLUTION,
    )
    if not local.exists():
        return {}
    slices, box_px = {LOCAL: planes((density := read_map(local)).data)}, density.box_px
    for key, names in (("map", (products.WEIGHTED_MAP, products.MAP)), ("mask", (products.MASK,))):
        path = next((reconstruct_folder / name for name in names if (reconstruct_folder / name).exists()), None)
        if path is not None and (density := read_map(path)).box_px == box_px:
            slices[key] = planes(density.data)
    return slices


def entries(d: DiagnoseRecord, slices: Slices) -> list[Entry]:
    """Figures, as `cryoiso.report.figure_list` wants them."""
    from cryoiso.report.sections import map_quality_figures as draw

    local, model = section(d, "local_resolution"), section(d, "model")
    shown = local and slices
    curves = numbers_of(model, "fsc_masked") and section(model, "table")
    return [
        (LOCAL, "Local resolution", shown, _local_caption(local), lambda: draw.local(slices, d)),
        (MODEL, "Atomic model in the map", curves, _model_caption(model), lambda: draw.model(d)),
    ]


def _local_caption(local: dict[str, Any]) -> str:
    known = {key: number(local, name) for key, name in (
        ("window", "window_A"), ("threshold", "threshold"), ("coarsest", "coarsest_A"))}  # fmt: skip
    return "" if None in known.values() else LOCAL_CAPTION.format(**known)


def _model_caption(model: dict[str, Any]) -> str:
    sigma = number(model, "sigma_A")
    return "" if sigma is None else MODEL_CAPTION.format(placed=model.get("placed"), sigma=sigma)


def texts(d: DiagnoseRecord) -> dict[str, Text]:
    """Words and table of the model."""
    model = section(d, "model")
    other = section(model, "comparison")
    if not model:
        return {}
    said = [f"Residues are listed in {products.Q_TABLE} of the stage 'diagnose'."]
    outside = number(model, "outside")
    if outside:
        said.append(
            f"{outside:,.0f} of {number(model, 'atoms') or 0:,.0f} atoms lie outside the map and have no Q-score."
        )
    rows = [
        ("model", str(model.get("model", ""))),
        ("second model, compared with it", str(other.get("model", ""))),
        ("residues that correspond", _count(number(other, "pairs"), number(other, "length"))),
    ]
    return {MODEL: Text(tuple(said), (), tuple(row for row in rows if row[1]))}


def _count(part: float | None, total: float | None) -> str:
    return "" if part is None or total is None else f"{part:,.0f} of {total:,.0f}"


def number_rows(d: DiagnoseRecord) -> list[tuple[str, str, Any, str, Any]]:
    """Rows of the table of numbers."""
    local, model = section(section(d, "local_resolution"), "percentiles_A"), section(d, "model")
    other = section(model, "comparison")
    rows: list[tuple[str, str, Any, str, Any]] = [
        ("Local resolution", f"{name} inside the mask", number(local, key), "Å", None)
        for key, name in (("5", "5th percentile"), ("50", "median"), ("95", "95th percentile"))
    ]
    for label, part, key, unit in (
        ("correlation where it was placed", model, "correlation", ""),
        ("resolution, FSC 0.5, inside the model's mask", model, "resolution_05_masked_A", "Å"),
        ("Q-score, mean over atoms", model, "q", ""),
        ("Q-score, main chain", model, "q_backbone", ""),
        ("Q-score, side chains", model, "q_side", ""),
        ("second model: RMSD of traced atoms", other, "rmsd_A", "Å"),
        ("second model: TM-like score", other, "tm_score", ""),
    ):
        rows.append(("Atomic model", label, number(part, key), unit, None))
    return rows


def sentences(d: DiagnoseRecord) -> list[str]:
    """For the summary: what EMDB will flag."""
    flags = d.get("emdb_flags")
    return emdb_flags.sentences(flags) if isinstance(flags, list) else []
