"""Do the particles confirm their reference, where the refinement never had it? Nothing is repeated."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cryoiso.core import products
from cryoiso.io.mrc import read_map
from cryoiso.methods.audit import confirmed
from cryoiso.methods.audit.confirmed import ReferenceCorrelation
from cryoiso.methods.audit.likeness import Band
from cryoiso.methods.audit.omega import TWO_SIDED
from cryoiso.methods.audit.record import ControlRecord, FigureData, Verdict
from cryoiso.pipeline.audit.bench import Bench
from cryoiso.pipeline.audit.repeat import Case, Outcome

NAME, TITLE = "reference", "Confirmation of the reference by the particles"
LEAST = 0.2
"""Correlation with the particles' signal that a reference must exceed to be confirmed; noise and particles of another
molecule reach that by the common outline."""
WORTH = 0.5
"""Correlation that a homologue worth the name has: where it can be excluded, the reference is wrong."""


@dataclass(frozen=True)
class Maps:
    """The run's map that has seen nothing of the reference beyond the first low-pass filter."""

    volume: np.ndarray
    halves: tuple[np.ndarray, np.ndarray]


def cases(bench: Bench) -> list[Case]:
    """None: the run's own half-maps say it."""
    return []


def maps_of(folder: Path) -> Maps:
    """Final maps of the raw particles; those of the poses before the auxiliary particles where there were any, since
    these show the whole reference."""
    before = folder / products.INITIAL_POSES
    place = before if before.is_dir() else folder
    first, second = (read_map(place / name).data for name in products.HALF_MAPS)
    return Maps(read_map(place / products.WEIGHTED_MAP).data, (first, second))


def record(bench: Bench, unchanged: Outcome, outcomes: dict[str, Outcome]) -> ControlRecord:
    """Correlation of the particles' signal with the reference, in shells that no search had of it."""
    lowpass_A = bench.job.reference.lowpass_A
    grid = bench.resolution_A, bench.box_px, bench.pixel_size_A
    band, advice = confirmed.band_of(lowpass_A, *grid), _advice(lowpass_A, confirmed.better_lowpass(lowpass_A, *grid))
    if not band.usable:
        return ControlRecord(
            NAME, TITLE, "inconclusive",
            f"The data can neither confirm nor refute the reference: {_too_few_shells(lowpass_A, *grid)}. Coarser than "
            f"its first reference every map resembles it, that of noise as well. {advice}",
        )  # fmt: skip
    correlation = confirm(bench, bench.run.folder.stage("reconstruct"), bench.reference, bench.inside, band)
    return judged(correlation, lowpass_A, (band.first, band.last), advice)


def _too_few_shells(lowpass_A: float, resolution_A: float, box_px: int, pixel_size_A: float) -> str:
    """Why nothing can be compared."""
    if resolution_A >= lowpass_A:
        return f"the resolution of {resolution_A:.1f} Å is no finer than the first reference ({lowpass_A:g} Å)"
    finest_A = lowpass_A / confirmed.FINER
    end = f"the resolution of {resolution_A:.1f} Å" if resolution_A > finest_A else f"half of that, {finest_A:g} Å"
    return (
        f"a box of {box_px * pixel_size_A:.0f} Å has too few Fourier shells between the first reference "
        f"({lowpass_A:g} Å) and {end}"
    )


def _advice(lowpass_A: float, better_A: float | None) -> str:
    """How to come to a decision.

    Args:
        better_A: low-pass filter of a first reference that leaves more shells to the particles; None: none does.
    """
    start = "To decide it, refine more particles"
    if better_A is None:
        return start + "."
    return (
        f"{start}, or repeat the run with a {'coarser' if better_A > lowpass_A else 'finer'} first reference "
        f"(reference.lowpass_A = {better_A:g}), which leaves more shells to judge by."
    )


def confirm(
    bench: Bench, folder: Path, reference: np.ndarray, inside: np.ndarray, band: Band
) -> ReferenceCorrelation:  # fmt: skip
    """How far the maps of a refinement confirm its reference.

    Args:
        folder: of the stage ``reconstruct``.
        reference: (D, D, D); inside: (D, D, D) bool, its outline.
    """
    half_maps = maps_of(folder)
    return confirmed.confirm(
        bench.aligned(half_maps.volume, reference),
        half_maps.halves, reference, bench.aligned(confirmed.mirror_image(reference), half_maps.volume),
        inside, band, bench.pixel_size_A, bench.diameter_A, bench.operations, bench.seed,
    )  # fmt: skip


def judged(
    correlation: ReferenceCorrelation, lowpass_A: float, shells: tuple[int, int], advice: str = ""
) -> ControlRecord:
    """The record of a confirmation.

    Args:
        shells: first and last of those that were compared.
        advice: how to come to a decision where there is none.
    """
    verdict, finest_A = verdict_of(correlation), correlation.finest_A
    where = (
        f"between {finest_A * shells[1] / shells[0]:.1f} and {finest_A:.1f} Å, where the refinement never had anything "
        "of the reference"
    )
    return ControlRecord(
        NAME, TITLE, verdict, _sentence(correlation, verdict, lowpass_A, where, advice),
        measure="correlation of the particles' signal with the reference, in shells that no search had of it",
        number=correlation.value, interval=correlation.interval, threshold=LEAST,
        power="A right reference has 1; one above "
        f"{LEAST + TWO_SIDED * correlation.error:.2f} would have been confirmed."
        if np.isfinite(correlation.error) else "",
        details={
            "shells": list(shells), "mirror": correlation.mirror, "decoys": len(correlation.decoys),
            "decoys_that_agree_as_well": correlation.reached, "largest_decoy": float(correlation.decoys.max()),
            "decoys_rms": correlation.error,
        },
        figure=FigureData(
            "correlation with the particles' signal", "",
            intervals=[
                ("reference", correlation.value, *correlation.interval),
                ("mirror image", correlation.mirror, correlation.mirror, correlation.mirror),
                ("random densities", 0.0, -TWO_SIDED * correlation.error, TWO_SIDED * correlation.error),
            ],
            level=LEAST,
            caption=f"Agreement {where}: 1 for the right one, 0 for an unrelated one. Random densities have its "
            "outline, symmetry and spectrum; 95 % of them are within the bar.",
        ),
    )  # fmt: skip


def verdict_of(correlation: ReferenceCorrelation) -> Verdict:
    """Pass: confirmed, and better than the mirror image. Fail: it is no homologue worth the name, by shells in which
    one would agree."""
    low, high = correlation.interval
    if not (np.isfinite(low) and np.isfinite(high)):
        return "inconclusive"
    if low > LEAST and correlation.reached == 0:
        return "pass" if correlation.mirror < correlation.value - correlation.error else "inconclusive"
    return "fail" if high < WORTH and correlation.may_refute else "inconclusive"


def _sentence(correlation: ReferenceCorrelation, verdict: Verdict, lowpass_A: float, where: str, advice: str) -> str:
    if not np.isfinite(correlation.value):
        return (
            f"The data can neither confirm nor refute the reference: beyond the first reference ({lowpass_A:g} Å) the "
            f"half-maps do not agree with each other. {advice}"
        )
    low, high = correlation.interval
    where = f"{where[0].upper()}{where[1:]}, "
    numbers = (
        f"the particles' signal has a correlation of {correlation.value:.2f} ({low:.2f} to {high:.2f}) with it; the "
        f"best of {len(correlation.decoys)} random densities of the same outline has "
        f"{correlation.decoys.max():.2f}, the mirror image {correlation.mirror:.2f}."
    )
    if verdict == "pass":
        return "The particles confirm the reference. " + where + numbers
    if verdict == "fail":
        return (
            f"The data do not confirm the reference. {where}{numbers} The same outline alone gives about "
            f"{LEAST:g}, and {WORTH:g}, a quarter of the signal's power, is excluded: the images show another "
            "molecule, or none, or their poses are wrong. Do not interpret this map; repeat the run with another "
            "reference."
        )
    if low > LEAST and correlation.reached == 0:
        return (
            f"The particles do not tell the reference from its mirror image. {where}{numbers} Find out the hand at a "
            "higher resolution before you interpret the map."
        )
    if not correlation.may_refute and high < WORTH:
        numbers += (
            f" Finer than {confirmed.REFUTING_A:g} Å a right homologue may have as little: half of its residues may "
            "differ, and parts of it may have moved."
        )
    return "The data neither confirm nor refute the reference. " + where + numbers + " " + advice
