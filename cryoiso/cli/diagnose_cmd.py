"""``cryoiso diagnose``: what two half-maps and their poses are worth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def diagnose(
    half1: Annotated[Path, typer.Option("--half1", help="First half-map (MRC), neither masked nor filtered.")],
    half2: Annotated[Path, typer.Option("--half2", help="Second half-map (MRC).")],
    mask: Annotated[Path | None, typer.Option(help="Solvent mask (MRC); made from the maps if not given.")] = None,
    particles: Annotated[Path | None, typer.Option(help="STAR or .cs file with the poses.")] = None,
    symmetry: Annotated[str, typer.Option(help="Point group: Cn, Dn, T, O or I.")] = "C1",
    truth_particles: Annotated[Path | None, typer.Option(help="STAR file with the true poses.")] = None,
    truth_map: Annotated[Path | None, typer.Option(help="The true map (MRC), on the same grid.")] = None,
    pixel_size: Annotated[float | None, typer.Option(help="Å per pixel, if the headers are wrong.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the phase randomisation.")] = 1,
    fsc3d: Annotated[Path | None, typer.Option("--fsc3d", help="Also write the 3DFSC (MRC).")] = None,
    phase_cosine: Annotated[
        Path | None, typer.Option("--phase-cosine", help="Also write spIsoNet's mean phase cosine (MRC); no 3DFSC.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="JSON file for all numbers and curves.")] = None,
) -> None:
    """Measure half-maps and poses.

    Resolution (FSC) as a whole and by direction (3DFSC, cFAR, FSO), view distribution and sampling (SCF), a verdict,
    and, where the truth is known, pose and map errors.
    """
    from cryoiso.pipeline.diagnose_directional import write_volume
    from cryoiso.pipeline.standalone import diagnose_files
    from cryoiso.pipeline.work import write_json

    numbers = diagnose_files(
        half1, half2, mask, particles, symmetry, truth_particles, truth_map, pixel_size_A=pixel_size, seed=seed
    )
    if out is not None:
        write_json(out, numbers)
    if fsc3d is not None:
        write_volume("fsc3d", half1, half2, mask, fsc3d, pixel_size_A=pixel_size)
    if phase_cosine is not None:
        write_volume("phase-cosine", half1, half2, mask, phase_cosine, pixel_size_A=pixel_size)
    typer.echo("\n".join(_lines(numbers)))
    if out is not None:
        typer.echo(f"all numbers: {out}")


def _lines(d: dict[str, Any]) -> list[str]:
    """The main numbers, one a line."""
    rows: list[tuple[str, Any, str]] = [
        ("resolution, FSC 0.143, corrected for the mask", d.get("resolution_0143_A"), " Å"),
        ("resolution, FSC 0.143, masked", d.get("resolution_0143_masked_A"), " Å"),
        ("resolution, FSC 0.143, unmasked", d.get("resolution_0143_unmasked_A"), " Å"),
    ]
    truth, errors = d.get("map_to_truth") or {}, d.get("pose_errors") or {}
    views = (d.get("views") or {}).get("estimated") or {}
    rows += [
        ("resolution against the truth, FSC 0.5", truth.get("resolution_05_A"), " Å"),
        ("views within 36° of z", _percent(views.get("top_fraction")), " %"),
        ("pose error, median", errors.get("median_deg"), "°"),
        ("poses wrong by more than 20°", _percent(errors.get("fraction_over_20")), " %"),
    ]
    rows += _directional_rows(d)
    lines = [f"{label:48s} {value:8.2f}{unit}" for label, value, unit in rows if value is not None]
    verdict = d.get("verdict") or {}
    said = [f"verdict: {verdict['verdict']}. {verdict['sentence']} {verdict['advice']}"] if verdict else []
    return [*lines, *said, *d.get("notes", [])]


def _directional_rows(d: dict[str, Any]) -> list[tuple[str, Any, str]]:
    by_direction, sampling = d.get("directional") or {}, (d.get("sampling") or {}).get("estimated") or {}
    return [
        ("resolution by direction, finest", by_direction.get("resolution_min_A"), " Å"),
        ("resolution by direction, coarsest", by_direction.get("resolution_max_A"), " Å"),
        ("cFAR (open definition)", by_direction.get("cfar"), ""),
        ("3DFSC sphericity", by_direction.get("sphericity"), ""),
        ("SCF* of the views", sampling.get("scf_star"), ""),
    ]


def _percent(fraction: float | None) -> float | None:
    return None if fraction is None else 100 * fraction
