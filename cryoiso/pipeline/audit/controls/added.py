"""Blobs added to the reference: do they vanish from the map?"""

from __future__ import annotations

import numpy as np

from cryoiso.methods.audit import omega as density
from cryoiso.methods.audit import regions
from cryoiso.methods.audit.record import ControlRecord, FigureData, at_most
from cryoiso.pipeline.audit.bench import Bench
from cryoiso.pipeline.audit.controls.omitted import refused_sentence
from cryoiso.pipeline.audit.repeat import Case, Outcome, job_of

NAME, TITLE = "added", "Density added to the reference"
LARGEST = 0.1
"""Share of the added density that may be left."""
PART = 0.3
"""A blob is where it exceeds this share of its maximum."""


def _blobs(bench: Bench) -> np.ndarray:
    return regions.blobs(bench.reference, bench.inside, bench.operations, bench.pixel_size_A)


def cases(bench: Bench) -> list[Case]:
    """One, with a ball and its symmetry mates beside the particle."""
    path = bench.write_reference(NAME, "reference", bench.reference + _blobs(bench))
    return [Case(NAME, "blobs", job_of(bench, path))]


def record(bench: Bench, unchanged: Outcome, outcomes: dict[str, Outcome]) -> ControlRecord:
    """What is left of the blobs, beyond what the map made with the right reference has there."""
    if unchanged.refused:
        return ControlRecord(NAME, TITLE, "inconclusive", refused_sentence(bench, unchanged))
    if outcomes["blobs"].refused:
        return ControlRecord(
            NAME, TITLE, "pass", "Images were refused with the blobs in the reference, as not matching it."
        )
    added = bench.smooth(_blobs(bench))
    part = (added > PART * float(added.max())) & ~bench.inside
    made = bench.aligned(outcomes["blobs"].map(), unchanged.map())
    left = density.share_left(
        bench.smooth(made), bench.smooth(unchanged.map()), added, part, bench.inside,
        bench.smooth(bench.reference), bench.block_px, bench.seed, bench.operations,
    )  # fmt: skip
    # a blob and its mates are fewer blocks than an interval needs where the resolution is low
    interval = left.interval if np.isfinite(left.error) else (left.value - LARGEST / 2, left.value + LARGEST / 2)
    verdict = at_most(interval, LARGEST) if np.isfinite(left.value) else "inconclusive"
    sentence = f"Of balls that the reference had beside the particle, {100 * left.value:.0f} % is left in the map."
    return ControlRecord(
        NAME, TITLE, verdict, sentence, measure="share of the added density that is left", number=left.value,
        interval=interval, threshold=LARGEST,
        power="" if np.isfinite(left.error) else "The balls are too few blocks for an interval; ± 5 % is assumed.",
        details={"voxels": int(part.sum())},
        figure=FigureData(
            "share left", "", intervals=[("blobs", left.value, *interval)], level=LARGEST,
            caption="Density of the balls in the map, as a share of what the reference had there.",
        ),
    )  # fmt: skip
