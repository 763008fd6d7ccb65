"""``cryoiso diagnose``: what two half-maps and their poses are worth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cryoiso.cli.common import echo
from cryoiso.cli.groups import SYMMETRY
from cryoiso.cli.options import JobOptions, help_of, keys, with_keys
from cryoiso.core import products
from cryoiso.core.errors import UsageError
from cryoiso.core.records import DiagnoseRecord

HALF1, HALF2 = "First half-map (MRC), unmasked and unfiltered.", "Second half-map (MRC)."
TRUTH = keys("truth", "Simulated particles", ("particles", "--truth-particles"), ("map", "--truth-map"))
MODEL = keys("diagnose", "Atomic model", "model", "compare_model", "fit_model", "q_sigma_A")
LOCAL = keys("diagnose", "Local resolution", "local_window_A", "local_threshold")
OUT = Path(products.facts("diagnose"))


@with_keys(SYMMETRY, TRUTH, MODEL, LOCAL, keys("run", "Computing", "seed"))
def diagnose(
    job_options: JobOptions,
    half1: Annotated[Path | None, typer.Argument(metavar="HALF1", help=HALF1)] = None,
    half2: Annotated[Path | None, typer.Argument(metavar="HALF2", help=HALF2)] = None,
    half1_option: Annotated[Path | None, typer.Option("--half1", help="Same as HALF1.")] = None,
    half2_option: Annotated[Path | None, typer.Option("--half2", help="Same as HALF2.")] = None,
    mask: Annotated[Path | None, typer.Option(help=help_of("sample", "mask"))] = None,
    particles: Annotated[Path | None, typer.Option(help="STAR or .cs file with the poses.")] = None,
    pixel_size: Annotated[float | None, typer.Option(help="Pixel size, if the headers are wrong.  [Å]")] = None,
    fsc3d: Annotated[Path | None, typer.Option("--fsc3d", help="Also write the 3DFSC (MRC).")] = None,
    phase_cosine: Annotated[
        Path | None,
        typer.Option("--phase-cosine", help="Also write spIsoNet's mean phase cosine (MRC), which is no 3DFSC."),
    ] = None,
    local_resolution: Annotated[
        Path | None, typer.Option("--local-resolution", help="Also measure the local resolution and write it (MRC).")
    ] = None,
    model_map: Annotated[
        Path | None,
        typer.Option(
            "--map", help="Map that --model belongs to (default: the mean of the half-maps); needs no half-maps."
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="JSON file for all numbers and curves.")] = OUT,
) -> None:
    """Measure half-maps and poses.

    Prints global (FSC) and directional resolution (3DFSC, cFAR, FSO), view distribution and sampling (SCF), a verdict
    and, for simulated particles, the errors of poses and map. With --model, map-model FSC and Q-scores; without
    half-maps, these alone.
    """
    from cryoiso.io.atomic import require_map_target, require_target
    from cryoiso.pipeline.commands.diagnose import diagnose_files, diagnose_model, write_volume

    require_target(out)
    for target in (fsc3d, phase_cosine, local_resolution):
        if target is not None:
            require_map_target(target)
    job = job_options.job(particles={"file": "-"}, reference={"file": "-"})
    table = out.parent / products.Q_TABLE
    if model_map is not None and job.diagnose.model and not any((half1, half2, half1_option, half2_option)):
        numbers = diagnose_model(model_map, job.diagnose, job.sample.symmetry, table, pixel_size_A=pixel_size)
        _tell(numbers, out)
        return
    first, second = _given(half1, half1_option, "HALF1"), _given(half2, half2_option, "HALF2")
    if job.truth.particles and particles is None:
        raise UsageError("--truth-particles needs --particles, the poses that are compared", code="option-missing")
    true_poses, true_map = (Path(name) if name else None for name in (job.truth.particles, job.truth.map))
    numbers = diagnose_files(
        first, second, mask, particles, job.sample.symmetry, true_poses, true_map,
        pixel_size_A=pixel_size, seed=job.run.seed, section=job.diagnose, model_map=model_map,
        local_resolution=local_resolution, table=table,
    )  # fmt: skip
    _tell(numbers, out)
    if fsc3d is not None:
        write_volume("fsc3d", first, second, mask, fsc3d, pixel_size_A=pixel_size)
    if phase_cosine is not None:
        write_volume("phase-cosine", first, second, mask, phase_cosine, pixel_size_A=pixel_size)


def _tell(numbers: DiagnoseRecord, out: Path) -> None:
    """All numbers in a file, then the main ones on the terminal (which a pipe may have closed)."""
    from cryoiso.io.atomic import write_json

    write_json(out, numbers)
    echo("\n".join(_lines(numbers)))
    echo(f"all numbers: {out}")
    if numbers.get("model"):
        echo(f"Q-scores by residue: {out.parent / products.Q_TABLE}")


def _given(argument: Path | None, option: Path | None, name: str) -> Path:
    """A half-map's file, which may stand by itself or behind its option.

    Raises:
        UsageError: it is missing, or given twice.
    """
    if (argument is None) == (option is None):
        problem = "is missing" if option is None else "is given twice"
        raise UsageError(
            f"{name} {problem}: cryoiso diagnose HALF1 HALF2, or --half1 HALF1 --half2 HALF2", code="option-missing"
        )
    path = option if argument is None else argument
    assert path is not None  # one of them is there
    return path


def _lines(d: DiagnoseRecord) -> list[str]:
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
    rows += _directional_rows(d) + _local_rows(d) + _model_rows(d)
    lines = [f"{label:48s} {value:8.2f}{unit}" for label, value, unit in rows if value is not None]
    said = []
    if verdict := d.get("verdict"):
        said = [f"verdict: {verdict['verdict']}. {verdict['sentence']} {verdict['advice']}"]
    return [*lines, *said, *d.get("notes", [])]


def _directional_rows(d: DiagnoseRecord) -> list[tuple[str, Any, str]]:
    by_direction, sampling = d.get("directional") or {}, (d.get("sampling") or {}).get("estimated") or {}
    mask = by_direction.get("mask") or {}
    return [
        ("resolution by direction, finest", by_direction.get("resolution_min_A"), " Å"),
        ("resolution by direction, coarsest", by_direction.get("resolution_max_A"), " Å"),
        ("cFAR (open definition)", by_direction.get("cfar"), ""),
        ("cFAR without the mask", mask.get("cfar_unmasked"), ""),
        ("agreement that the mask makes", _percent(mask.get("share")), " %"),
        ("the same, directions that agree least", _percent(mask.get("share_worst")), " %"),
        ("3DFSC sphericity", by_direction.get("sphericity"), ""),
        ("SCF* of the views", sampling.get("scf_star"), ""),
    ]


def _local_rows(d: DiagnoseRecord) -> list[tuple[str, Any, str]]:
    at = (d.get("local_resolution") or {}).get("percentiles_A") or {}
    names = (("5", "5th percentile"), ("50", "median"), ("95", "95th percentile"))
    return [(f"local resolution in the mask, {name}", at.get(key), " Å") for key, name in names]


def _model_rows(d: DiagnoseRecord) -> list[tuple[str, Any, str]]:
    model = d.get("model") or {}
    other = model.get("comparison") or {}
    return [
        (f"map and model, correlation ({model.get('placed')})", model.get("correlation"), ""),
        ("map and model, FSC 0.5, model's mask", model.get("resolution_05_masked_A"), " Å"),
        (f"Q-score (sigma {model.get('sigma_A')} Å)", model.get("q"), ""),
        ("Q-score, main chain", model.get("q_backbone"), ""),
        ("Q-score, side chains", model.get("q_side"), ""),
        ("both models, RMSD of traced atoms", other.get("rmsd_A"), " Å"),
        ("both models, TM-like score", other.get("tm_score"), ""),
    ]


def _percent(fraction: float | None) -> float | None:
    return None if fraction is None else 100 * fraction
