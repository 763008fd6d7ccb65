"""Regions left out of the reference: are they in the map all the same?"""

from __future__ import annotations

import numpy as np

from cryoiso.methods.audit import omega as density
from cryoiso.methods.audit import regions
from cryoiso.methods.audit.blocks import Estimate
from cryoiso.methods.audit.record import ControlRecord, FigureData, Verdict, at_most, gravest
from cryoiso.pipeline.audit.bench import Bench
from cryoiso.pipeline.audit.repeat import Case, Outcome, job_of

NAME, TITLE = "omitted", "Regions left out of the reference"
LARGEST = 0.25
"""Share of a region's density that may depend on the reference."""


def chosen(bench: Bench) -> list[np.ndarray]:
    """The regions, each (D, D, D) bool."""
    settings = bench.job.audit
    return regions.regions(
        bench.reference, bench.inside, bench.operations, settings.regions, settings.region_share
    )  # fmt: skip


def shortened(bench: Bench, region: np.ndarray) -> np.ndarray:
    """The reference without a region."""
    return regions.without(bench.reference, region, bench.pixel_size_A)


def cases(bench: Bench) -> list[Case]:
    """One for each region."""
    cases_of_omitted = []
    for number, region in enumerate(chosen(bench), 1):
        path = bench.write_reference(NAME, f"reference-{number}", shortened(bench, region))
        cases_of_omitted.append(Case(NAME, f"region-{number}", job_of(bench, path)))
    return cases_of_omitted


def record(bench: Bench, unchanged: Outcome, outcomes: dict[str, Outcome]) -> ControlRecord:
    """Omega of every region (Lucas et al. 2023) and of all together."""
    if unchanged.refused:
        return ControlRecord(NAME, TITLE, "inconclusive", refused_sentence(bench, unchanged))
    unchanged_map = unchanged.map()
    full, estimates, lost = bench.smooth(unchanged_map), {}, []
    for name, region in zip(sorted(outcomes), chosen(bench), strict=True):
        if outcomes[name].refused:
            lost.append(name)
            continue
        result = bench.aligned(outcomes[name].map(), unchanged_map)
        estimates[name] = _omega(bench, full, bench.smooth(result), region)
    if not estimates:
        return ControlRecord(
            NAME, TITLE, "inconclusive", "Without these regions the images no longer match the reference beyond chance."
        )
    worst = max(estimates.values(), key=lambda e: e.value if np.isfinite(e.value) else -np.inf)
    judged = {name: at_most(e.interval, LARGEST) for name, e in estimates.items()}
    verdicts = [*judged.values()]
    percent = ", ".join(f"{100 * e.value:.0f} %" for e in estimates.values())
    sentence = f"Of the density of {len(estimates)} regions that the reference did not have, the map lacks {percent}"
    sentence += " (Ω: 0 if the data alone make it, 100 % if the reference does). " + advice(judged, bench.is_whole)
    if lost:
        sentence += f" Without {len(lost)} of the regions the images no longer matched the reference."
    return ControlRecord(
        NAME, TITLE, gravest([*verdicts, *(["inconclusive"] if lost else [])]), sentence,  # type: ignore[list-item]
        measure="largest Ω of a region, the share of its density that depends on the reference",
        number=worst.value, interval=worst.interval, threshold=LARGEST,
        power=f"An Ω above {LARGEST + 2 * worst.error:.2f} would have been seen." if np.isfinite(worst.error) else "",
        details={"omega": {name: [e.value, e.low, e.high] for name, e in estimates.items()}},
        figure=FigureData(
            "Ω", "region", intervals=[(name, e.value, e.low, e.high) for name, e in estimates.items()], level=LARGEST,
            caption="Share of each region's density that depends on whether the reference has it, with 95 % intervals. "
            "0: all of it comes from the images; beyond the line the control fails.",
        ),
    )  # fmt: skip


def _omega(bench: Bench, full: np.ndarray, omitted: np.ndarray, region: np.ndarray) -> Estimate:
    templates = bench.smooth(bench.reference), bench.smooth(shortened(bench, region))
    part = density.differing(*templates) & bench.inside
    return density.omega(
        full, omitted, part, bench.inside & ~part, bench.solvent, bench.block_px, bench.seed, bench.operations
    )  # fmt: skip


def advice(judged: dict[str, Verdict], is_whole_run: bool) -> str:
    """What the verdicts of the regions mean for the map, and what to do.

    Args:
        judged: name of a region's folder -> verdict.
        is_whole_run: the controls had all particles of the run.
    """
    bad, open_ = ([name for name, verdict in judged.items() if verdict == v] for v in ("fail", "inconclusive"))
    if not bad and not open_:
        return "The images make this density, whether the reference has it or not."
    parts = []
    if bad:
        parts.append(
            f"More than {100 * LARGEST:.0f} % of {' and '.join(bad)} comes from the reference: interpret nothing there "
            "that the map without it does not show."
        )
    if open_:
        parts.append(f"Whether more than {100 * LARGEST:.0f} % of {' and '.join(open_)} does is not decided.")
        parts.append(UNDECIDED if is_whole_run else MORE)
    parts.append(f"Compare the maps in audit/{NAME}/REGION with the run's: what both show there comes from the images.")
    return " ".join(parts)


MORE = "More particles may decide it (audit.particles)."
UNDECIDED = (
    "All particles were used, so that only further images decide it: usually views from directions that the set has "
    "few of, which leave the reference a say."
)


def refused_sentence(bench: Bench, unchanged: Outcome) -> str:
    """What is said where the unchanged repetition was refused."""
    return (
        f"The {len(bench.rows):,} particles of the controls do not match the reference beyond chance, so that nothing "
        "can be compared. Give more of them (audit.particles), or look at the particles and the reference."
    )
