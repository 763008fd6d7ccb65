"""Regions left out of the reference: are they in the map all the same?"""

from __future__ import annotations

import numpy as np

from cryoiso.methods.audit import omega as density
from cryoiso.methods.audit.blocks import Estimate
from cryoiso.methods.audit.omega import TWO_SIDED, Matched
from cryoiso.methods.audit.record import ControlRecord, FigureData, Verdict, at_most, gravest
from cryoiso.pipeline.audit import arms
from cryoiso.pipeline.audit.bench import Bench
from cryoiso.pipeline.audit.repeat import Case, Outcome

NAME, TITLE = "omitted", "Regions left out of the reference"
LARGEST = 0.25
"""Share of a region's density that may depend on the reference. A region of two thirds of the particle's mean density,
as the periphery has, then still stands above a contour level at half of that mean by what the images make of it."""


def cases(bench: Bench) -> list[Case]:
    """One for each region."""
    return arms.region_cases(bench)


def record(bench: Bench, unchanged: Outcome, outcomes: dict[str, Outcome]) -> ControlRecord:
    """Omega of every region (Lucas et al. 2023), the same of the regions that the reference had, and the difference."""
    if unchanged.refused:
        return ControlRecord(NAME, TITLE, "inconclusive", refused_sentence(bench, unchanged))
    lost = [name for name, outcome in outcomes.items() if outcome.refused]
    regions = _matched(bench, unchanged, {k: v for k, v in outcomes.items() if k not in lost})
    if not regions:
        return ControlRecord(
            NAME, TITLE, "inconclusive", "Without these regions the images no longer match the reference beyond chance."
        )
    overall = combined(regions, bench.seed)
    judged = {name: at_most(region.interval, LARGEST) for name, region in by_region(regions).items()}
    verdict = verdict_of(overall, judged, bool(lost) or not is_sound(regions))
    return ControlRecord(
        NAME, TITLE, verdict, _sentence(regions, overall, judged, bench.is_whole, len(lost)),
        measure="share of the regions' density that depends on the reference having them",
        number=overall.value, interval=overall.interval, threshold=LARGEST,
        power=f"A share above {LARGEST + TWO_SIDED * overall.error:.2f} would have been found."
        if np.isfinite(overall.error) else "",
        details={
            "omega": {name: [m.omega.value, m.omega.low, m.omega.high] for name, m in regions.items()},
            "regions_that_the_reference_had": {name: [m.floor.value, m.floor.low, m.floor.high]
                                               for name, m in regions.items()},
            "difference": {name: [m.net.value, m.net.low, m.net.high] for name, m in regions.items()},
            "standard_error": overall.error, "refused": lost,
        },
        figure=FigureData(
            "share of the density that is lost", "region",
            intervals=[
                *((f"{name} left out (Ω)", m.omega.value, *m.omega.interval) for name, m in regions.items()),
                *((f"{name} kept", m.floor.value, *m.floor.interval) for name, m in regions.items()
                  if np.isfinite(m.floor.value)),
                ("depends on the reference", overall.value, *overall.interval),
            ],
            level=LARGEST,
            caption="Density that is lost when the reference lacks a region (Ω), and what the same region loses when "
            "another one is left out, since fewer particles find their pose. Only the difference comes from the "
            "reference; beyond the line the control fails. The references are "
            f"audit/{arms.FOLDER}/reference-1.mrc and so on; the first has the balls of the next control as well.",
        ),
    )  # fmt: skip


def _matched(bench: Bench, unchanged: Outcome, outcomes: dict[str, Outcome]) -> dict[str, Matched]:
    """Name of a region -> its Omega, floor and difference."""
    unchanged_map = unchanged.map()
    full, template = bench.smooth(unchanged_map), bench.smooth(bench.reference)
    maps = {name: bench.smooth(bench.aligned(outcome.map(), unchanged_map)) for name, outcome in outcomes.items()}
    parts = {
        f"region-{number}": density.differing(template, bench.smooth(arms.shortened(bench, region))) & bench.inside
        for number, region in enumerate(arms.omitted_regions(bench), 1)
    }
    rest = bench.inside & ~np.any([*parts.values()], axis=0)
    return {
        name: density.matched(
            full, shortened_map, [other for k, other in maps.items() if k != name], parts[name], rest, bench.solvent,
            bench.block_px, bench.seed, bench.operations,
        )
        for name, shortened_map in maps.items()
    }  # fmt: skip


def by_region(regions: dict[str, Matched]) -> dict[str, Estimate]:
    """Name of a region -> what depends on the reference there. The repetitions differ in quality, which moves two
    regions in opposite directions: the scatter of the regions widens the interval of each."""
    if len(regions) == 1:
        return {name: region.omega for name, region in regions.items()}
    scatter = float(np.std([region.net.value for region in regions.values()], ddof=1))
    return {name: density.widened(region.net, scatter) for name, region in regions.items()}


def combined(regions: dict[str, Matched], seed: int) -> Estimate:
    """Of all regions together; a single region has no matched control, and its Omega counts whole."""
    return next(iter(regions.values())).omega if len(regions) == 1 else density.pooled([*regions.values()], seed)


def is_sound(regions: dict[str, Matched]) -> bool:
    """Whether the matched controls lose less than a region may: where they lose more, the repetitions differ too much
    for a pass. A difference that is beyond the limit all the same fails: the repetitions' quality moves two regions in
    opposite directions, so that it cancels in the sum and widens the interval of each."""
    return not any(region.floor.value > LARGEST for region in regions.values())


def verdict_of(overall: Estimate, judged: dict[str, Verdict], incomplete: bool) -> Verdict:
    """Of all regions together; one that fails by itself fails the control."""
    first = at_most(overall.interval, LARGEST)
    verdicts: list[Verdict] = [first, *(v for v in judged.values() if v == "fail")]
    return gravest([*verdicts, *(["inconclusive"] if incomplete else [])])  # type: ignore[list-item]


def _sentence(
    regions: dict[str, Matched], overall: Estimate, judged: dict[str, Verdict], is_whole_run: bool, lost: int
) -> str:  # fmt: skip
    omegas = ", ".join(f"{100 * region.omega.value:.0f} %" for region in regions.values())
    sentence = f"Of the density of {len(regions)} regions that the reference did not have, the map lacks {omegas} (Ω). "
    if len(regions) > 1:
        floors = ", ".join(f"{100 * region.floor.value:.0f} %" for region in regions.values())
        low, high = (100 * x for x in overall.interval)
        sentence += (
            f"While the reference has them and lacks another one, they lose {floors}: a poorer reference finds fewer "
            f"poses, which costs resolution everywhere. What depends on the reference is the difference, "
            f"{100 * overall.value:.0f} % ({low:.0f} to {high:.0f} %). "
        )
    if is_sound(regions) or verdict_of(overall, judged, incomplete=True) == "fail":
        sentence += advice(at_most(overall.interval, LARGEST), judged, is_whole_run)
    else:
        sentence += (
            f"That is more than {100 * LARGEST:.0f} %: the repetitions differ too much to decide anything, since poses "
            f"depend on every part of the reference. {UNDECIDED if is_whole_run else MORE}"
        )
    if lost:
        sentence += f" Without {lost} of the regions the images no longer matched the reference."
    return sentence


def advice(overall: Verdict, judged: dict[str, Verdict], is_whole_run: bool) -> str:
    """What the verdicts mean for the map, and what to do.

    Args:
        overall: of all regions together; judged: name of a region's folder -> verdict.
        whole: the controls had all particles of the run.
    """
    bad = [name for name, verdict in judged.items() if verdict == "fail"]
    if overall == "pass" and not bad:
        return "The images make this density, whether the reference has it or not."
    limit = f"{100 * LARGEST:.0f} %"
    parts = []
    if bad or overall == "fail":
        where = " and ".join(bad) or "these regions"
        parts.append(f"More than {limit} of {where} comes from the reference: interpret nothing there that the map "
                     "without it does not show.")  # fmt: skip
    else:
        parts.append(f"Whether more than {limit} does is not decided. {UNDECIDED if is_whole_run else MORE}")
    parts.append(f"Compare the maps in audit/{arms.FOLDER} with the run's: what all show comes from the images.")
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
