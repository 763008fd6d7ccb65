"""Repeats the stages of a run with one thing changed, in a folder of its own with a journal of its own."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from cryoiso.core import products
from cryoiso.core.config import Job, job_to_toml
from cryoiso.core.errors import STOPPED, InputError, Interrupted
from cryoiso.core.log import warnings_about
from cryoiso.core.types import Particles
from cryoiso.io.atomic import write_json, write_text
from cryoiso.io.mrc import read_map
from cryoiso.methods.audit import extent
from cryoiso.parallel.abort import on_root
from cryoiso.pipeline.audit.bench import Bench
from cryoiso.pipeline.audit.images import ImageSet
from cryoiso.pipeline.context import Control, RunContext
from cryoiso.pipeline.job_inputs import Inputs
from cryoiso.pipeline.records.hashing import digest_of, next_key, sha256_of, verify_outputs
from cryoiso.pipeline.records.journal import Journal
from cryoiso.pipeline.records.manifest import job_key
from cryoiso.pipeline.records.run_folder import RunFolder
from cryoiso.pipeline.run import do_stage, what_is_there
from cryoiso.pipeline.stages.rounds import final_poses
from cryoiso.pipeline.stages.table import stages_of
from cryoiso.pipeline.workflow import folder_stages

logger = logging.getLogger("cryoiso")
REFUSALS = ("reference-does-not-match-images", "contrast-inverted", "homologue-not-in-images")
"""Errors with which a refinement refuses images that do not belong to their reference."""
REFUSED = "refused.json"
LEFT_OUT = ("ingest", "diagnose", "audit", "report")
LAST = "reconstruct"
Images = Literal["real", "null", "leak"]


@dataclass(frozen=True)
class Case:
    """A repetition."""

    control: str
    name: str
    job: Job
    images: Images = "real"
    particles: Particles | None = field(default=None, repr=False)
    """the subset with other poses or half-sets; None: as the run read them (rank 0)"""
    changed: Control | None = None
    last: str = LAST
    """stage to end with, where the workflow has it"""
    identity: str = ""
    """of everything that is changed and stands neither in the job nor in ``changed``"""


@dataclass(frozen=True)
class Outcome:
    """What came of a repetition, or the run itself where nothing was to be repeated."""

    context: RunContext
    refused: str = ""
    """the message, where the images were refused"""

    def stage(self, name: str) -> Path:
        return self.context.folder.stage(name)

    def map(self, name: str = products.WEIGHTED_MAP) -> Any:
        """(D, D, D) one of the final maps."""
        return read_map(self.stage("reconstruct") / name).data

    def poses(self) -> Path:
        """Particle file with the final poses."""
        return final_poses(self.context)


def job_of(bench: Bench, reference: Path | None = None, *, plain: bool = False) -> Job:
    """The run's job as a control repeats it.

    Args:
        reference: a map on the particles' grid instead of the run's; None: the run's own, as it was prepared.
        plain: a refinement without the rest of the workflow.
    """
    job = extent.jobs(bench.job)[1 if plain else 0]
    file = reference or bench.run.folder.stage("reference") / products.REFERENCE
    job.reference = job.reference.model_copy(
        update={"file": str(file), "fit": "", "resample": False, "pixel_size_A": None, "fit_resolution_A": None}
    )
    job.sample.diameter_A = bench.diameter_A
    return job


def repeat(bench: Bench, case: Case, images: ImageSet) -> Outcome:
    """Does a repetition, or what is left of it; stages that are done and unchanged are not done again. Collective.

    Raises:
        Interrupted: what is done is kept.
    """
    comm = bench.comm
    job = case.job.model_copy(deep=True)
    job.particles.file, job.particles.invert = str(images.folder), "auto"
    folder = RunFolder(bench.folder / case.control / case.name, folder_stages(job))
    key = on_root(comm, lambda: _begin(folder, job, case, images))
    nested = RunContext(
        job, folder, comm, control=case.changed, label=f"audit, {case.control} {case.name}: ",
        journal=Journal(folder.journal) if comm.rank == 0 else None,
    )  # fmt: skip
    refused = on_root(comm, _was_refused, folder, key)
    if refused:
        return Outcome(nested, refused)
    particles = (case.particles if case.particles is not None else images.particles) if comm.rank == 0 else None
    try:
        with warnings_about(nested.label):
            _stages(nested, Inputs(job, folder, comm, particles), key, case.last)
    except InputError as error:
        if error.code not in REFUSALS:
            raise
        on_root(comm, write_json, folder.path / REFUSED, {"key": key, "message": str(error)})
        if comm.rank == 0:
            logger.info("%srefused: %s", nested.label, error)
        return Outcome(nested, str(error))
    return Outcome(nested)


def _begin(folder: RunFolder, job: Job, case: Case, images: ImageSet) -> str:
    """The folder with its job; the key of everything that decides the result."""
    folder.path.mkdir(parents=True, exist_ok=True)
    write_text(folder.resolved, job_to_toml(job))
    changed = case.changed
    halves = changed.half_references if changed is not None and changed.half_references else ()
    return digest_of(
        job_key(job), images.digest, case.identity, sha256_of(Path(job.reference.file)),
        "" if changed is None else repr(changed.grey_scale), *(sha256_of(path) for path in halves),
    )  # fmt: skip


def _was_refused(folder: RunFolder, key: str) -> str:
    file = folder.path / REFUSED
    if not file.is_file():
        return ""
    saved = json.loads(file.read_text(encoding="utf-8"))
    return str(saved["message"]) if saved.get("key") == key else ""


def _stages(run: RunContext, inputs: Inputs, key: str, last: str) -> None:
    """The stages from the reference to the last one."""
    comm = run.comm
    last = last if run.folder.has(last) else LAST
    for stage in stages_of(run.job, run.folder):
        if stage.name in LEFT_OUT:
            continue
        outputs, resume = on_root(comm, what_is_there, run, stage, key)
        if outputs is not None and verify_outputs(run.folder.path, outputs, comm):
            outputs, resume = None, False
        if outputs is None:
            if comm.stop_requested():
                raise Interrupted(STOPPED)
            if comm.rank == 0:
                logger.info("%s%s", run.label, stage.name)
            outputs = do_stage(run, inputs, stage, key, resume=resume)
        key = next_key(key, stage.name, outputs)
        if stage.name == last:
            return


def with_control(case: Case, grey_scale: float, halves: tuple[Path, Path] | None = None) -> Case:
    """The case with images that need not match the reference."""
    return replace(case, changed=Control(grey_scale, halves))
