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
from cryoiso.pipeline.preflight import check_job
from cryoiso.pipeline.records.run_folder import RunFolder
from cryoiso.pipeline.stages import ingest, reference, refine
from cryoiso.pipeline.work import Work, using_scratch


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
    work = begin_refinement(job, out, comm, resume=resume)
    with using_scratch(work):
        refine.refine(work)


def begin_refinement(job: Job, out: Path, comm: Context, *, resume: bool) -> Work:
    """Checks a job, and makes the shards and the reference that its refinement begins with. Collective."""
    work = Work(job, FlatFolder(out.absolute()), comm, resume=resume)
    comm.device_preference = job.run.device
    comm.install_signal_handlers()
    on_root(comm, check_job, work)
    on_root(comm, _begin_or_go_on, work)
    for name in ("refine", "ingest", "reference"):
        on_root(comm, work.folder.stage(name).mkdir, parents=True, exist_ok=True)
    if on_root(comm, lambda: work.shards == work.folder.stage("ingest")):
        ingest.ingest(work)
    reference.reference(work)
    return work


def _begin_or_go_on(work: Work) -> None:
    begin_or_go_on(work.folder.path, work.job, work.particles(), work.reference().map, work.mask(), work.resume)
