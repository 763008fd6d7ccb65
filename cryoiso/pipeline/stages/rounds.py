"""What the rounds of the workflow ``auxiliary`` leave for each other: poses, references, and whether they go on."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from cryoiso.core import products
from cryoiso.core.errors import InputError
from cryoiso.core.records import IterationRecord
from cryoiso.core.types import HALVES, DensityMap, Particles
from cryoiso.io import read_particle_file
from cryoiso.io.atomic import write_json
from cryoiso.io.mrc import read_map
from cryoiso.parallel.abort import on_root
from cryoiso.pipeline.context import RunContext
from cryoiso.pipeline.inputs.particle_tables import bare
from cryoiso.pipeline.job_inputs import Inputs
from cryoiso.pipeline.workflow import kind_of
from cryoiso.refine.junk import with_junk_of_file

logger = logging.getLogger("cryoiso")
CERTAINTY = ("rlnMaxValueProbDistribution", "rlnLogLikeliContribution", "cryoisoPoseEntropy", "cryoisoPoseSpread")


def is_settled(run: RunContext, round_: int) -> bool:
    """Whether an earlier round moved nothing any more, so that this one is left out (the same on every rank)."""

    def read() -> bool:
        for earlier in range(1, round_):
            path = run.folder.stage(f"corefine-{earlier}") / products.facts("corefine")
            facts = json.loads(path.read_text(encoding="utf-8"))
            if facts.get("settled") or facts.get("skipped"):
                return True
        return False

    return bool(on_root(run.comm, read))


SETTLED = "the poses had settled in the round before"
UNCONFIRMED = "the raw particles confirm nothing of the homologue, so auxiliary particles would have no weight"


def skip(run: RunContext, name: str, reason: str = SETTLED, **more: Any) -> None:
    """Notes that a stage was left out (collective).

    Args:
        more: further facts.
    """
    facts = {"skipped": True, "reason": reason, **more}
    on_root(run.comm, write_json, run.folder.stage(name) / products.facts(kind_of(name)), facts)
    if run.comm.rank == 0:
        logger.info("%s is skipped, because %s", name, reason)


def found_before(run: RunContext, round_: int) -> IterationRecord | None:
    """What the training of a round was told of the homologue; None where it did not ask (collective)."""

    def read() -> IterationRecord | None:
        path = run.folder.stage(f"train-{round_}") / products.facts("train")
        facts = json.loads(path.read_text(encoding="utf-8"))
        if "homologue" not in facts:
            return None
        return {"homologue": facts["homologue"], "homologue_precision": facts["homologue_precision"]}

    return on_root(run.comm, read)


def nothing_confirmed(evidence: IterationRecord | None) -> TypeGuard[IterationRecord]:
    """Whether it was asked how far the homologue is confirmed, and it is not: then nothing is trained or generated."""
    return evidence is not None and not evidence["homologue"]["confirmed"]


def last_round(run: RunContext) -> int:
    """The last round that was done; 0 if there is none yet (reads files, so call it on rank 0)."""
    done = 0
    for r in range(1, run.job.auxiliary.rounds + 1):
        path = run.folder.stage(f"corefine-{r}") / products.facts("corefine")
        if not path.exists() or json.loads(path.read_text(encoding="utf-8")).get("skipped"):
            break
        done = r
    return done


def engine_folder(run: RunContext, name: str) -> Path:
    """Where the engine works inside a stage's folder."""
    folder = run.folder.stage(name) / "engine"
    on_root(run.comm, folder.mkdir, exist_ok=True)
    return folder


def pose_file(run: RunContext, round_: int) -> Path:
    """The poses after a round; for round 0 those of the initial refinement, of the selected classes where there are
    any."""
    if round_ == 0 and run.folder.has("classify"):
        return run.folder.stage("classify") / products.SELECTED
    return run.folder.stage(f"corefine-{round_}" if round_ else "refine") / products.PARTICLES


def poses_after(run: RunContext, inputs: Inputs, round_: int) -> Particles:
    """The raw particles with the poses after a round and how certain they are, on every rank (collective)."""

    def read() -> Particles:
        path = pose_file(run, round_)
        posed_set = read_particle_file(path, run.job.particles.project, ("pose",))
        particles = bare(inputs.particles())
        if not np.array_equal(posed_set.uid, particles.uid):
            raise InputError(
                "the refined particles are not those of this run",
                file=path,
                hint="Start a new run.",
                code="run-particles-differ",
            )
        columns = {
            name: np.asarray(posed_set.table[name], np.float64)
            for name in CERTAINTY
            if posed_set.table is not None and name in posed_set.table
        }
        columns |= with_junk_of_file(posed_set, path).results
        posed = particles.with_poses(*posed_set.require_poses(path)).with_results(**columns)
        return posed.with_intensity(posed_set.signal_scale, posed_set.noise_level)

    return on_root(run.comm, read)


def noise_after(run: RunContext, inputs: Inputs, round_: int) -> np.ndarray | None:
    """The noise spectra of the raw particles that the refinement of a round estimated, the initial one for round 0:
    (G, S) by optics group and shell, infinite where a shell is empty; None where it left none (collective)."""

    def read() -> np.ndarray | None:
        folder = run.folder.stage(f"corefine-{round_}") / "engine" if round_ else run.folder.stage("refine")
        path = folder / products.facts("refine")
        noise_variance = json.loads(path.read_text(encoding="utf-8")).get("noise_variance") if path.exists() else None
        if noise_variance is None:
            return None
        # the groups of auxiliary particles come after those of the raw ones
        rows = [[np.inf if value is None else value for value in row] for row in noise_variance]
        return np.array(rows[: len(inputs.particles().groups)], np.float64)

    return on_root(run.comm, read)


def known_grey_scale(run: RunContext, round_: int) -> float | None:
    """In a control: factor from the references after a round to the images, which need not match them; else None. Maps
    that were made from the images have their grey scale."""
    if run.control is None:
        return None
    return 1.0 if round_ or run.folder.has("micelle") else run.control.grey_scale


def control_references(run: RunContext) -> dict[int, DensityMap] | None:
    """The initial references of the half-sets in a control that gives each its own (rank 0)."""
    if run.control is None or run.control.half_references is None:
        return None
    return {h: read_map(path) for h, path in zip(HALVES, run.control.half_references, strict=True)}


def references_after(run: RunContext, round_: int, *, with_micelle: bool = True) -> dict[int, DensityMap]:
    """The reference of each half after a round (collective); one and the same map for both where nothing of the
    data is in it."""
    micelle = with_micelle and run.folder.has("micelle")

    def read() -> dict[int, DensityMap]:
        if round_:
            folder = run.folder.stage(f"corefine-{round_}")
            return {h: read_map(_post_processed(folder, h)) for h in HALVES}
        if micelle:
            folder = run.folder.stage("micelle")
            return {h: read_map(folder / products.composite_half(h)) for h in HALVES}
        if (control := control_references(run)) is not None:
            return control
        reference = read_map(run.folder.stage("reference") / products.REFERENCE)
        return {1: reference, 2: reference}

    maps = on_root(run.comm, read)
    if round_ == 0 and not micelle and (run.control is None or run.control.half_references is None):
        maps[2] = maps[1]  # what was one map is one map again after it travelled between ranks
    return maps


def _post_processed(folder: Path, half: int) -> Path:
    """The map that the user's command made of this half's reference, if there is one."""
    path = folder / products.post_processed(half)
    return path if path.exists() else folder / products.half_reference(half)


def final_poses(run: RunContext) -> Path:
    """The particle file with the run's last poses (rank 0)."""
    if not run.folder.has("train-1"):
        return pose_file(run, 0)
    if run.folder.has("local"):
        return run.folder.stage("local") / products.PARTICLES
    return pose_file(run, last_round(run))
