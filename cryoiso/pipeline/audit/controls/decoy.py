"""Another fold as the reference: is it refused, or does the map not follow it?"""

from __future__ import annotations

import numpy as np

from cryoiso.core import products
from cryoiso.core.types import DensityMap
from cryoiso.io.mrc import read_map
from cryoiso.methods.audit import likeness, regions
from cryoiso.methods.audit.likeness import Band
from cryoiso.methods.audit.record import ControlRecord, FigureData, Line, Verdict
from cryoiso.metrics.fsc_curve import fsc, resolution_at, shell_frequencies
from cryoiso.pipeline.audit.bench import Bench
from cryoiso.pipeline.audit.repeat import Case, Outcome, job_of
from cryoiso.pipeline.inputs.standard_frame import symmetrised

NAME, TITLE = "decoy", "Another fold as the reference"
FOLLOWS = 0.1
"""Correlation with the decoy, in shells that the refinement never got of it, that counts as following it."""


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
    mask = np.ones_like(decoy)
    curve = fsc(volume, decoy)
    parted_A = resolution_at(curve, 0.5, bench.box_px, bench.pixel_size_A)
    lowpass_A = bench.job.reference.lowpass_A
    claimed = resolution_at(
        fsc(*(outcome.map(name) for name in products.HALF_MAPS)), 0.143, bench.box_px, bench.pixel_size_A
    )
    band = Band.beyond(lowpass_A, claimed, bench.box_px, bench.pixel_size_A)
    beyond = likeness.correlation(volume, decoy, mask > 0, band, bench.seed, bench.operations) if band.usable else None
    verdict = _verdict(parted_A, lowpass_A, None if beyond is None else beyond.interval)
    sentence = f"With a random density as the reference, which was not refused, map and decoy part at {parted_A:.0f} Å"
    sentence += {
        "pass": ", coarser than what the refinement was given of it: the images decide.",
        "inconclusive": f": the map follows the decoy as far as it was given ({lowpass_A:g} Å) and no further. At such "
        "resolutions a reference decides what these images show.",
        "fail": f": the map follows the decoy beyond what was given of it ({lowpass_A:g} Å).",
        "not applicable": ".",
    }[verdict]
    return ControlRecord(
        NAME, TITLE, verdict, sentence, measure="resolution at which map and decoy part (FSC 0.5)", number=parted_A,
        interval=None, threshold=lowpass_A, unit="Å",
        details={"half_maps_A": claimed, "beyond": None if beyond is None else [beyond.value, beyond.low, beyond.high]},
        figure=FigureData(
            "spatial frequency (1/Å)", "FSC",
            [Line("map and decoy", shell_frequencies(bench.box_px, bench.pixel_size_A).tolist(), curve.tolist())],
            level=0.5,
            caption="Agreement of the map with the random density that it was refined against. The refinement "
            f"was given this density up to {1 / lowpass_A:.3f} 1/Å ({lowpass_A:g} Å).",
        ),
    )  # fmt: skip


def _verdict(parted_A: float, lowpass_A: float, beyond: tuple[float, float] | None) -> Verdict:
    if parted_A > lowpass_A:
        return "pass"
    if beyond is not None and beyond[0] > FOLLOWS:
        return "fail"
    return "inconclusive"
