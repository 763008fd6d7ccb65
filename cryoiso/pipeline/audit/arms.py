"""Repetitions from changed references that several controls share: each lacks a region, one has balls beside the
particle as well; and the matched control, which is repeated in the same way from the reference as it was.

A plain refinement is repeated by local searches around the run's final poses. A search over all views from a reference
that lacks a fifth of its mass loses some of the rare views, and a map without them lacks density everywhere; that is no
density that the reference made up. Around the final poses far fewer are lost. Poses that noise owes to the reference
are free to move within the search: of pure noise half of them do.
"""

from __future__ import annotations

import numpy as np

from cryoiso.core import products
from cryoiso.core.config import Job
from cryoiso.io.mrc import read_map
from cryoiso.methods.audit import regions
from cryoiso.methods.audit.extent import LOCAL_A, LOCAL_DEG, near_poses
from cryoiso.pipeline.audit.bench import Bench
from cryoiso.pipeline.audit.repeat import Case, job_of, with_control

FOLDER = "arms"
ELSEWHERE = 40
"""Other places beside the particle in which the scatter of added density is measured."""
POSES = "final poses"


def omitted_regions(bench: Bench) -> list[np.ndarray]:
    """The regions, each (D, D, D) bool."""
    settings = bench.job.audit
    return regions.regions(
        bench.reference, bench.inside, bench.operations, settings.regions, settings.region_share
    )  # fmt: skip


def shortened(bench: Bench, region: np.ndarray) -> np.ndarray:
    """The reference without a region."""
    return regions.without(bench.reference, region, bench.pixel_size_A)


def balls(bench: Bench) -> list[np.ndarray]:
    """The ball and its symmetry mates, as dense as the particle's denser half, and the same in other places."""
    places = regions.blob_places(bench.inside, bench.operations, bench.pixel_size_A, ELSEWHERE, bench.seed)
    height = float(np.percentile(bench.reference[bench.inside], 75))
    return [height * regions.blob_at(p, bench.box_px, bench.operations, bench.pixel_size_A) for p in places]


def region_cases(bench: Bench, count: int | None = None) -> list[Case]:
    """One repetition for each of the regions, or for the first few; the first reference has the balls."""
    cases = []
    for number, region in enumerate(omitted_regions(bench)[:count], 1):
        data = shortened(bench, region)
        if number == 1:
            data = data + balls(bench)[0]
        path = bench.write_reference(FOLDER, f"reference-{number}", data)
        job = job_of(bench, path, plain=near_poses(bench.job))
        cases.append(_case(bench, f"region-{number}", job))
    return cases


def unchanged_case(bench: Bench) -> Case | None:
    """The matched control; None where it is the run itself."""
    if near_poses(bench.job):
        return _case(bench, "unchanged", job_of(bench, plain=True))
    return None if bench.is_whole else Case(FOLDER, "unchanged", job_of(bench))


def local_case(bench: Bench) -> Case:
    """A local search around the run's final poses, from its own map."""
    best = bench.run.folder.stage("reconstruct") / products.WEIGHTED_MAP
    job = job_of(bench, bench.write_reference(FOLDER, "own-map", read_map(best).data), plain=True)
    job.reference.lowpass_A = max(bench.smoothing_A, 2 * bench.pixel_size_A)
    _search_locally(bench, job)
    return Case(FOLDER, "local", job, particles=bench.posed, identity=POSES)


def _case(bench: Bench, name: str, job: Job) -> Case:
    """A plain refinement starts at the run's poses, and its images need not match the reference: few of them, or ones
    of noise, say nothing if they are refused."""
    if not near_poses(bench.job):
        return Case(FOLDER, name, job)
    _search_locally(bench, job)
    return with_control(Case(FOLDER, name, job, particles=bench.posed, identity=POSES), bench.grey_scale)


def _search_locally(bench: Bench, job: Job) -> None:
    job.refine.local_deg = LOCAL_DEG
    job.refine.shift_range_A = min(LOCAL_A, 0.4 * bench.box_px * bench.pixel_size_A)
