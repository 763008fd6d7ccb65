"""Another fold as the reference: is it refused, or does the map not follow it?"""

from __future__ import annotations

import numpy as np

from cryoiso.core import products
from cryoiso.core.types import DensityMap
from cryoiso.io.mrc import read_map
from cryoiso.methods.audit import regions
from cryoiso.methods.audit.confirmed import ReferenceCorrelation, band_of
from cryoiso.methods.audit.record import ControlRecord, FigureData, Line, Verdict
from cryoiso.metrics.fsc_curve import fsc, resolution_at, shell_frequencies
from cryoiso.pipeline.audit.bench import Bench, inside_of
from cryoiso.pipeline.audit.controls import reference
from cryoiso.pipeline.audit.repeat import Case, Outcome, job_of
from cryoiso.pipeline.inputs.standard_frame import symmetrised

NAME, TITLE = "decoy", "Another fold as the reference"


def cases(bench: Bench) -> list[Case]:
    """One, with a random compact density of the particle's size, spectrum and symmetry."""
    other_fold = regions.other_fold(bench.reference, bench.inside, bench.seed, bench.pixel_size_A)
    even = symmetrised(DensityMap(other_fold, bench.pixel_size_A), bench.job.sample.symmetry).data
    data = regions.with_spectrum_of(even, bench.reference)
    return [Case(NAME, "fold", job_of(bench, bench.write_reference(NAME, "reference", data)))]


def record(bench: Bench, unchanged: Outcome, outcomes: dict[str, Outcome]) -> ControlRecord:
    """Where the map and the decoy part."""
    outcome = outcomes["fold"]
    if outcome.refused:
        return ControlRecord(
            NAME, TITLE, "pass", "With a random density of the same size as the reference, the images were refused: "
            "they do not match it beyond chance.", measure="resolution at which map and decoy part", unit="Å",
        )  # fmt: skip
    decoy, volume = read_map(outcome.stage("reference") / products.REFERENCE).data, outcome.map()
    curve = fsc(volume, decoy)
    parted_A = resolution_at(curve, 0.5, bench.box_px, bench.pixel_size_A)
    lowpass_A = bench.job.reference.lowpass_A
    claimed = resolution_at(
        fsc(*(outcome.map(name) for name in products.HALF_MAPS)), 0.143, bench.box_px, bench.pixel_size_A
    )
    correlation = None if parted_A > lowpass_A else _confirmed(bench, outcome, decoy, claimed)
    verdict = verdict_of(parted_A, lowpass_A, correlation)
    sentence = f"With a random density as the reference, which was not refused, map and decoy part at {parted_A:.0f} Å"
    sentence += _conclusion(verdict, lowpass_A, correlation, claimed)
    return ControlRecord(
        NAME, TITLE, verdict, sentence, measure="resolution at which map and decoy part (FSC 0.5)", number=parted_A,
        interval=None, threshold=lowpass_A, unit="Å",
        details={
            "half_maps_A": claimed,
            "confirmed": None if correlation is None else [correlation.value, *correlation.interval],
        },
        figure=FigureData(
            "spatial frequency (1/Å)", "FSC",
            [Line("map and decoy", shell_frequencies(bench.box_px, bench.pixel_size_A).tolist(), curve.tolist())],
            level=0.5,
            caption="Agreement of the map with the random density that it was refined against. The refinement "
            f"was given this density up to {1 / lowpass_A:.3f} 1/Å ({lowpass_A:g} Å).",
        ),
    )  # fmt: skip


def _confirmed(bench: Bench, outcome: Outcome, decoy: np.ndarray, claimed_A: float) -> ReferenceCorrelation | None:
    """What the control of the reference finds of the decoy; None where it has too few shells."""
    band = band_of(bench.job.reference.lowpass_A, claimed_A, bench.box_px, bench.pixel_size_A)
    if not band.usable:
        return None
    inside = inside_of(DensityMap(decoy, bench.pixel_size_A), bench.inside)
    return reference.confirm(bench, outcome.stage("reconstruct"), decoy, inside, band)


def verdict_of(parted_A: float, lowpass_A: float, correlation: ReferenceCorrelation | None) -> Verdict:
    """Pass: the wrong reference would have been noticed, since the map does not follow it as far as it was given, or
    since the particles refute it beyond. Fail: they would have confirmed it."""
    if parted_A > lowpass_A:
        return "pass"
    if correlation is None:
        return "inconclusive"
    opposite: dict[Verdict, Verdict] = {"fail": "pass", "pass": "fail"}
    return opposite.get(reference.verdict_of(correlation), "inconclusive")


def _conclusion(verdict: Verdict, lowpass_A: float, correlation: ReferenceCorrelation | None, claimed_A: float) -> str:
    if verdict == "pass" and correlation is None:
        return ", coarser than what the refinement was given of it: the images decide."
    follows = f": the map follows the decoy as far as it was given ({lowpass_A:g} Å)"
    if correlation is None and claimed_A < lowpass_A:
        return (
            f"{follows}, and the box has too few Fourier shells beyond for the first control. Coarser than that, a "
            "reference decides what these images show."
        )
    if correlation is None or not np.isfinite(correlation.value):
        return (
            f"{follows}, and the half-maps agree no further. At such resolutions a reference decides what these images "
            "show."
        )
    low, high = correlation.interval
    numbers = f"a correlation of {correlation.value:.2f} ({low:.2f} to {high:.2f}) with the particles' signal beyond"
    if verdict == "pass":
        return f"{follows}, but the first control would have refuted it ({numbers}): a wrong reference is noticed."
    if verdict == "fail":
        return (
            f"{follows}, and the first control would have confirmed it ({numbers}): with these images a wrong "
            "reference is not noticed. Trust nothing of the map that rests on the reference alone."
        )
    return f"{follows}, and the first control would not have decided ({numbers}). Choose the reference with care."
