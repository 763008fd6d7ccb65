"""The stage ``diagnose``: every quality number of the run, in one JSON file."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from cryoiso.core import products
from cryoiso.core.records import DiagnoseRecord
from cryoiso.io import read_particle_file
from cryoiso.io.atomic import write_json
from cryoiso.io.mrc import read_map
from cryoiso.parallel.group_stop import on_root_heeding
from cryoiso.pipeline.context import RunContext
from cryoiso.pipeline.job_inputs import Inputs
from cryoiso.pipeline.stages.map_numbers import measure_further
from cryoiso.pipeline.stages.rounds import final_poses, pose_file

logger = logging.getLogger("cryoiso")


SHARED_NETWORK = (
    "The poses were found with references made by one network that saw both half-sets (realign.mode = paired): the "
    "half-map FSC is no gold standard."
)


def diagnose(run: RunContext, inputs: Inputs, *, resume: bool) -> None:
    """All quality numbers, measured on rank 0."""
    on_root_heeding(run.comm, _diagnose, run, inputs)


def _diagnose(run: RunContext, inputs: Inputs) -> None:
    from cryoiso.methods.assess.measure import diagnose as measure

    maps, job = run.folder.stage("reconstruct"), run.job
    half1, half2, mask = (read_map(maps / name) for name in (*products.HALF_MAPS, products.MASK))
    with_true_poses = maps / products.TRUE_POSES / products.MAP

    def numbers_of(half_map1: np.ndarray, half_map2: np.ndarray, star: Path, true_poses: Path | None) -> DiagnoseRecord:
        return measure(
            half_map1, half_map2, mask.data, half1.pixel_size_A,
            read_particle_file(star, job.particles.project, ("pose",)),
            job.sample.symmetry,
            truth_particles=inputs.truth(),
            truth_map=inputs.truth_map(),
            truth_pose_map=read_map(true_poses).data if true_poses and true_poses.exists() else None,
            seed=job.run.seed,
        )  # fmt: skip

    numbers = numbers_of(half1.data, half2.data, final_poses(run), with_true_poses)
    if run.folder.has("train-1"):
        first = run.folder.stage("reconstruct") / products.INITIAL_POSES
        earlier = [read_map(first / products.half_map(h)).data for h in (1, 2)]
        before = pose_file(run, 0)
        logger.info("the same for the maps before the auxiliary particles, to compare with")
        numbers["before"] = numbers_of(earlier[0], earlier[1], before, None)
    primary = maps / products.WEIGHTED_MAP
    measure_further(
        numbers, half1, half2, mask.data, read_map(primary) if primary.exists() else None, job.diagnose,
        job.sample.symmetry, run.folder.stage("diagnose"),
    )  # fmt: skip
    if run.folder.has("correct") and job.realign.correct and job.realign.mode == "paired":
        numbers["notes"].append(SHARED_NETWORK)
    if job.run.propose_symmetry:
        from cryoiso.physics.symmetry_proposal import propose_symmetry

        proposed = propose_symmetry(half1, half2)
        logger.info("%s", proposed.words)
        numbers["symmetry_proposal"] = proposed.facts()
        numbers["notes"].append(f"Symmetry proposed from the half-maps, not imposed: {proposed.words}")
    write_json(run.folder.stage("diagnose") / products.facts("diagnose"), numbers)
