"""The stage ``diagnose``: every quality number of the run, in one JSON file."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from cryoiso.core.records import DiagnoseRecord
from cryoiso.io import read_particle_file
from cryoiso.io.atomic import write_json
from cryoiso.io.mrc import read_map
from cryoiso.parallel.group_stop import on_root_heeding
from cryoiso.pipeline.stages.rounds import final_poses
from cryoiso.pipeline.work import Work

logger = logging.getLogger("cryoiso")


SHARED_NETWORK = (
    "The poses were found with references made by one network that saw both half-sets (realign.mode = paired): the "
    "half-map FSC is no gold standard."
)


def diagnose(work: Work) -> None:
    """All quality numbers, measured on rank 0."""
    on_root_heeding(work.comm, _diagnose, work)


def _diagnose(work: Work) -> None:
    from cryoiso.methods.assess.measure import diagnose as measure

    maps, job = work.folder.stage("reconstruct"), work.job
    half1, half2, mask = (read_map(maps / name) for name in ("half1.mrc", "half2.mrc", "mask.mrc"))
    with_true_poses = maps / "truth_poses" / "map.mrc"

    def numbers_of(one: np.ndarray, two: np.ndarray, star: Path, true_poses: Path | None) -> DiagnoseRecord:
        return measure(
            one, two, mask.data, half1.pixel_size_A,
            read_particle_file(star, work.job.particles.project, ("pose",)),
            work.job.sample.symmetry,
            truth_particles=work.truth(),
            truth_map=work.truth_map(),
            truth_pose_map=read_map(true_poses).data if true_poses and true_poses.exists() else None,
            seed=work.job.run.seed,
        )  # fmt: skip

    numbers = numbers_of(half1.data, half2.data, final_poses(work), with_true_poses)
    if work.folder.has("train-1"):
        first = work.folder.stage("reconstruct") / "initial_poses"
        earlier = [read_map(first / f"half{h}.mrc").data for h in (1, 2)]
        before = work.folder.stage("refine") / "particles.star"
        logger.info("the same for the maps before the auxiliary particles, to compare with")
        numbers["before"] = numbers_of(earlier[0], earlier[1], before, None)
    if work.folder.has("correct") and job.realign.correct and job.realign.mode == "paired":
        numbers["notes"].append(SHARED_NETWORK)
    write_json(work.folder.stage("diagnose") / "diagnose.json", numbers)
