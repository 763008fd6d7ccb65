"""Blobs added to the reference: do they vanish from the map?"""

from __future__ import annotations

import numpy as np

from cryoiso.methods.audit import omega as density
from cryoiso.methods.audit.blocks import Estimate
from cryoiso.methods.audit.record import ControlRecord, FigureData, Verdict, at_most
from cryoiso.pipeline.audit import arms
from cryoiso.pipeline.audit.bench import Bench
from cryoiso.pipeline.audit.controls.omitted import MORE, UNDECIDED, refused_sentence
from cryoiso.pipeline.audit.repeat import Case, Outcome

NAME, TITLE = "added", "Density added to the reference"
LARGEST = 0.25
"""Share of the added density that may be left."""
BALLS = "region-1"
"""The repetition whose reference has the balls."""


def cases(bench: Bench) -> list[Case]:
    """One, with a ball and its symmetry mates beside the particle."""
    return arms.region_cases(bench, 1)


def advice(verdict: Verdict, left: Estimate, is_whole_run: bool) -> str:
    """What a verdict means for the map, and what to do."""
    if verdict == "pass":
        return (
            f"The images remove what only the reference has, but for at most {100 * max(left.high, 0):.0f} % of its "
            "density."
        )
    if not np.isfinite(left.value):
        return "The map does not resemble its reference enough to measure it."
    most = left.high if np.isfinite(left.high) else left.value
    level = f"Density below {100 * max(most, 0):.0f} % of the particle's may come from the reference alone"
    if verdict == "fail":
        return f"{level}: do not interpret it; repeat the run from a reference without the features in question."
    return (
        f"{level}; whether more than {100 * LARGEST:.0f} % stays is not decided. {UNDECIDED if is_whole_run else MORE}"
    )


def record(bench: Bench, unchanged: Outcome, outcomes: dict[str, Outcome]) -> ControlRecord:
    """What is left of the blobs, beyond what the map made with the right reference has there."""
    if unchanged.refused:
        return ControlRecord(NAME, TITLE, "inconclusive", refused_sentence(bench, unchanged))
    if outcomes[BALLS].refused:
        return ControlRecord(
            NAME, TITLE, "pass", "Images were refused with the blobs in the reference, as not matching it."
        )
    added, *elsewhere = (bench.smooth(ball) for ball in arms.balls(bench))
    result = bench.aligned(outcomes[BALLS].map(), unchanged.map())
    rest = bench.inside & ~arms.omitted_regions(bench)[0]
    left = density.share_left(
        bench.smooth(result), bench.smooth(unchanged.map()), added, elsewhere, rest,
        bench.smooth(bench.reference),
    )  # fmt: skip
    verdict = at_most(left.interval, LARGEST)
    return ControlRecord(
        NAME, TITLE, verdict, _sentence(left) + advice(verdict, left, bench.is_whole),
        measure="share of the added density that is left",
        number=left.value, interval=left.interval, threshold=LARGEST,
        power=f"A share above {LARGEST + 2 * left.error:.2f} would have been seen." if np.isfinite(left.error) else "",
        details={"other_places": len(elsewhere)},
        figure=FigureData(
            "share left", "", intervals=[("balls", left.value, *left.interval)], level=LARGEST,
            caption="Density of the balls in the map, as a share of what the reference had there. The interval is that "
            "of the same measurement in other places beside the particle.",
        ),
    )  # fmt: skip


def _sentence(left: Estimate) -> str:
    if not np.isfinite(left.value):
        return ""
    low, high = (100 * x for x in left.interval)
    share = f"{100 * left.value:.0f} %" + (f" ({low:.0f} to {high:.0f} %)" if np.isfinite(left.error) else "")
    return f"Of balls that the reference had beside the particle, {share} is left in the map. "
