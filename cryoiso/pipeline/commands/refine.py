"""The command ``refine`` on plain files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cryoiso.core.config import Job
from cryoiso.io.dimensionality import kind_of_particles
from cryoiso.parallel.abort import on_root
from cryoiso.parallel.context import Context
from cryoiso.pipeline.commands.begin import begin_or_go_on
from cryoiso.pipeline.commands.subtomograms import refine_subtomograms
from cryoiso.pipeline.context import RunContext
from cryoiso.pipeline.job_inputs import Inputs, using_scratch
from cryoiso.pipeline.preflight import check_job
from cryoiso.pipeline.records.run_folder import RunFolder
from cryoiso.pipeline.stages import ingest, reference, refine


@dataclass(frozen=True)
class FlatFolder(RunFolder):
    """The folder of a single command: the files of its last stage lie in it directly."""

    def stage(self, name: str) -> Path:
        return {"ingest": self.path / "shards", "reference": self.path / "reference"}.get(name, self.path)


def refine_files(job: Job, out: Path, comm: Context, *, resume: bool = False) -> None:
    """Refines the particles of a job into a folder: shards and reference in sub-folders, the result beside them.

    Subtomograms are not put into shards.

    Args:
        resume: go on with an interrupted refinement in the same folder.
    """
    if on_root(comm, kind_of_particles, job.particles.file, job.particles.project) == "volumes":
        return refine_subtomograms(job, out, comm, resume=resume)
    run, inputs = begin_refinement(job, out, comm, resume=resume)
    with using_scratch(inputs):
        refine.refine(run, inputs, resume=resume)


def begin_refinement(job: Job, out: Path, comm: Context, *, resume: bool) -> tuple[RunContext, Inputs]:
    """Checks a job, and makes the shards and the reference that its refinement begins with. Collective."""
    run = RunContext(job, FlatFolder(out.absolute()), comm)
    inputs = Inputs(job, run.folder, comm)
    comm.device_preference = job.run.device
    comm.install_signal_handlers()
    on_root(comm, check_job, inputs)
    on_root(comm, _begin_or_go_on, inputs, resume)
    for name in ("refine", "ingest", "reference"):
        on_root(comm, run.folder.stage(name).mkdir, parents=True, exist_ok=True)
    if on_root(comm, lambda: inputs.shards == run.folder.stage("ingest")):
        ingest.ingest(run, inputs, resume=resume)
    reference.reference(run, inputs, resume=resume)
    return run, inputs


def _begin_or_go_on(inputs: Inputs, resume: bool) -> None:
    particles, start, mask = inputs.particles(), inputs.reference().map, inputs.mask()
    begin_or_go_on(inputs.folder.path, inputs.job, particles, start, mask, resume)
