"""Blobs added to the reference: do they vanish from the map?"""

from __future__ import annotations

import numpy as np

from cryoiso.methods.audit import omega as density
from cryoiso.methods.audit import regions
from cryoiso.methods.audit.record import ControlRecord, FigureData, Verdict, at_most
from cryoiso.pipeline.audit.bench import Bench
from cryoiso.pipeline.audit.controls.omitted import MORE, UNDECIDED, refused_sentence
from cryoiso.pipeline.audit.repeat import Case, Outcome, job_of

NAME, TITLE = "added", "Density added to the reference"
LARGEST = 0.25
"""Share of the added density that may be left."""
ELSEWHERE = 40
"""Other places beside the particle in which the scatter is measured."""


def _blobs(bench: Bench) -> list[np.ndarray]:
    """The ball and its symmetry mates, as dense as the particle's denser half, and the same in other places."""
    places = regions.blob_places(bench.inside, bench.operations, bench.pixel_size_A, ELSEWHERE, bench.seed)
    height = float(np.percentile(bench.reference[bench.inside], 75))
    return [height * regions.blob_at(p, bench.box_px, bench.operations, bench.pixel_size_A) for p in places]


def cases(bench: Bench) -> list[Case]:
    """One, with a ball and its symmetry mates beside the particle."""
    path = bench.write_reference(NAME, "reference", bench.reference + _blobs(bench)[0])
    return [Case(NAME, "blobs", job_of(bench, path))]


def advice(verdict: Verdict, left: float, is_whole_run: bool) -> str:
    """What a verdict means for the map, and what to do."""
    if verdict == "pass":
        return "What only the reference has, the images remove."
    if not np.isfinite(left):
        return "The map does not resemble its reference enough to measure it."
    level = f"Density below {100 * max(left, 0):.0f} % of the particle's may come from the reference alone"
    if verdict == "fail":
        return f"{level}: do not interpret it; repeat the run from a reference without the features in question."
    return (
        f"{level}; whether more than {100 * LARGEST:.0f} % stays is not decided. {UNDECIDED if is_whole_run else MORE}"
    )


def record(bench: Bench, unchanged: Outcome, outcomes: dict[str, Outcome]) -> ControlRecord:
    """What is left of the blobs, beyond what the map made with the right reference has there."""
    if unchanged.refused:
        return ControlRecord(NAME, TITLE, "inconclusive", refused_sentence(bench, unchanged))
    if outcomes["blobs"].refused:
        return ControlRecord(
            NAME, TITLE, "pass", "Images were refused with the blobs in the reference, as not matching it."
        )
    added, *elsewhere = (bench.smooth(blob) for blob in _blobs(bench))
    result = bench.aligned(outcomes["blobs"].map(), unchanged.map())
    left = density.share_left(
        bench.smooth(result), bench.smooth(unchanged.map()), added, elsewhere, bench.inside,
        bench.smooth(bench.reference),
    )  # fmt: skip
    verdict = at_most(left.interval, LARGEST)
    sentence = f"Of balls that the reference had beside the particle, {100 * left.value:.0f} % is left in the map. "
    return ControlRecord(
        NAME, TITLE, verdict, sentence + advice(verdict, left.value, bench.is_whole),
        measure="share of the added density that is left",
        number=left.value, interval=left.interval, threshold=LARGEST,
        power=f"A share above {LARGEST + 2 * left.error:.2f} would have been seen." if np.isfinite(left.error) else "",
        details={"other_places": len(elsewhere)},
        figure=FigureData(
            "share left", "", intervals=[("blobs", left.value, *left.interval)], level=LARGEST,
            caption="Density of the balls in the map, as a share of what the reference had there. The interval is that "
            "of the same measurement in other places beside the particle.",
        ),
    )  # fmt: skip
