"""Looks at a machine and judges it: thoroughly for ``doctor``, quickly before a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from cryoiso.core.errors import CryoisoError
from cryoiso.parallel.abort import agree, on_root
from cryoiso.parallel.context import Context
from cryoiso.pipeline import finding as report
from cryoiso.pipeline.finding import Finding, Needs
from cryoiso.pipeline.job_inputs import Inputs
from cryoiso.pipeline.planning.memory import needs_of
from cryoiso.pipeline.preflight import existing_parent
from cryoiso.pipeline.site.checks import judge
from cryoiso.pipeline.site.machine import look
from cryoiso.pipeline.site.scratch_checks import SCRATCH
from cryoiso.pipeline.site.scratch_probe import Images, images_of, look_for_scratch


def examine(comm: Context, folder: Path, job_file: Path | None) -> tuple[dict[str, Any], list[Finding]]:
    """Facts and findings of all ranks, of a folder and, where one is given, for a job (collective).

    Raises:
        UsageError: the job file is bad.
        InputError: what it names is.
    """
    needs, images = None, Images("")
    if job_file is not None:
        needs, images = on_root(comm, _of_job, job_file, folder, comm)
        comm.device_preference = needs.job.run.device
    facts = look(comm, [("run folder", folder)], thorough=True)
    if scratch := look_for_scratch(comm, images, existing_parent(folder)):
        facts["folders"][SCRATCH] = scratch
    return facts, judge(facts, needs)


def _of_job(job_file: Path, folder: Path, comm: Context) -> tuple[Needs, Images]:
    from cryoiso.pipeline.jobfile import read_job
    from cryoiso.pipeline.records.run_folder import RunFolder
    from cryoiso.pipeline.workflow import folder_stages

    _, job = read_job(job_file)
    inputs = Inputs(job, RunFolder(folder.absolute(), folder_stages(job)), comm)
    return needs_of(inputs, comm.size), images_of(inputs, comm.size)


def check_machine(inputs: Inputs, asked: Callable[[Inputs, int], Needs] = needs_of) -> None:
    """The quick part of the same before a run: warnings go to the log, one line each (collective).

    Scratch is not looked at: where there is none, a run does without.

    Args:
        asked: what the run needs of the machine, on this number of ranks (rank 0).

    Raises:
        CryoisoError: the first error, with its exit code, before anything is written.
    """
    comm = inputs.comm
    needs = on_root(comm, asked, inputs, comm.size)
    device = needs.job.run.model_copy(update={"device": comm.device_preference})  # of a part of a run: what that needs
    needs = replace(needs, job=needs.job.model_copy(update={"run": device}))
    findings = judge(look(comm, [("run folder", inputs.folder.path)], thorough=False), needs)
    if comm.rank == 0:
        report.tell(findings)
    first = report.worst(findings)
    error = None
    if first is not None and first.severity == report.ERROR:
        error = CryoisoError(first.line(), code=first.code)
        error.exit_code = first.exit_code
    agree(comm, error)
