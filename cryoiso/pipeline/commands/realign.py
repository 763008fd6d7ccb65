"""``cryoiso realign`` on plain files: a refinement with the correction in its loop, with auxiliary particles or not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cryoiso.core import products
from cryoiso.core.config import Job
from cryoiso.core.errors import InputError
from cryoiso.io.atomic import write_json
from cryoiso.io.shards import ShardSource
from cryoiso.io.star.write import write_particles
from cryoiso.parallel.abort import on_root
from cryoiso.parallel.context import Context
from cryoiso.pipeline.commands.refine import begin_refinement, refine_files
from cryoiso.pipeline.context import RunContext
from cryoiso.pipeline.inputs.reference import PIXEL_TOLERANCE
from cryoiso.pipeline.job_inputs import Inputs, using_scratch
from cryoiso.pipeline.stages import engines
from cryoiso.pipeline.stages.half_maps import write_reconstruction
from cryoiso.pipeline.stages.refine import refine_request
from cryoiso.pipeline.workflow import starts_a_program


def realign_files(job: Job, out: Path, comm: Context, *, auxiliary: Path | None = None, resume: bool = False) -> None:
    """Refines the particles of a job (of the workflow ``realign``) into a folder. Collective.

    Args:
        auxiliary: shards that are refined together with the particles. The particles alone are kept and reconstructed;
            the engine's own files lie in ``engine``.
        resume: go on with an interrupted refinement in the same folder.

    Raises:
        InputError: what ``preflight.check_job`` finds, or auxiliary particles on another grid.
    """
    if auxiliary is None:
        return refine_files(job, out, comm, resume=resume)
    run, inputs = begin_refinement(job, out, comm, resume=resume)
    on_root(comm, _check, inputs, auxiliary)
    with using_scratch(inputs, everything=True):
        _refine_with(run, inputs, ShardSource(auxiliary), resume)


def _check(inputs: Inputs, folder: Path) -> None:
    source = ShardSource(folder)
    box, pixel = inputs.grid()
    theirs = source.particles.groups[0].pixel_size_A
    if source.box_px != box or abs(theirs / pixel - 1) > PIXEL_TOLERANCE:
        raise InputError(
            "the auxiliary particles are on another grid than the particles", file=folder,
            expected=f"{box} px of {pixel:g} Å", found=f"{source.box_px} px of {theirs:g} Å", code="grid-mismatch",
        )  # fmt: skip
    if source.particles.half is None or not np.isin(source.particles.half, (1, 2)).all():
        raise InputError(
            "the auxiliary particles have no half-sets",
            file=folder,
            expected="1 or 2 for each",
            code="particle-sets-differ",
        )
    source.close()


def _refine_with(run: RunContext, inputs: Inputs, auxiliary: ShardSource, resume: bool) -> None:
    from cryoiso.methods.auxiliary.corefine import co_refine

    comm, job, out = run.comm, run.job, run.folder.path
    request = replace(refine_request(run, inputs, resume=resume), folder=out / "engine")
    if inputs.scratch is not None:
        inputs.scratch.attach(auxiliary, once=starts_a_program(job))
    on_root(comm, request.folder.mkdir, exist_ok=True)
    refined = co_refine(engines.engine(job.refine.engine), request, auxiliary, comm, weight=job.auxiliary.weight)
    reconstruction = write_reconstruction(
        request.source, refined.raw, out, comm, symmetry=job.sample.symmetry, padding=job.reconstruct.padding,
        pixel_size_A=request.reference.pixel_size_A,
    )  # fmt: skip

    def write() -> None:
        write_particles(out / products.PARTICLES, refined.raw)
        record: dict[str, Any] = json.loads((request.folder / products.facts("refine")).read_text(encoding="utf-8"))
        counts = {"particles": len(refined.raw), "auxiliary": len(refined.auxiliary)}
        write_json(out / products.facts("refine"), {**record, **counts, **reconstruction})

    on_root(comm, write)
